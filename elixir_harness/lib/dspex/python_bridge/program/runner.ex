defmodule DSPex.PythonBridge.Program.Runner do
  @moduledoc false
  # The runs of a module's program: inputs to `execute_program`, and its results to structs.

  alias DSPex.PythonBridge.{Bridge, Client, Durable, Error, Pool}
  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.Program.{Cast, Field, Inputs, Spec, Tools}
  alias DSPex.PythonBridge.Programs.Declared

  # In addition to those of Bridge.stream.
  @own [:server, :lm, :config]

  @doc "A run, or a batch of them."
  @spec run(Spec.t(), term(), term()) ::
          {:ok, term()} | {:ok, term(), map()} | {:error, Error.t()}
  def run(spec, inputs, opts) do
    with {:ok, spec} <- identified(spec),
         {:ok, call, opts} <- prepare(spec, inputs, opts, [:meta, :on_chunk | of_stream()]),
         {meta?, opts} = Keyword.pop(opts, :meta),
         reply = call.client.request(call.server, :execute_program, call.args, opts),
         {:ok, result, meta} <- result(spec, call, reply) do
      if meta?, do: {:ok, result, meta}, else: {:ok, result}
    end
  end

  @doc "A durable run, or with `:resume` in place of the inputs one that is there."
  @spec durable(Spec.t(), term(), term()) ::
          {:ok, term()}
          | {:ok, term(), map()}
          | {:suspended, Durable.Run.t()}
          | {:error, Error.t() | atom()}
  def durable(spec, inputs, opts) do
    with {:ok, spec} <- identified(spec),
         {:ok, call, opts} <- prepare(spec, inputs, opts, [:meta | Durable.Options.names()]),
         {meta?, opts} = Keyword.pop(opts, :meta),
         {:ok, result, meta} <- result(spec, call, durably(call, inputs, opts)) do
      if meta?, do: {:ok, result, meta}, else: {:ok, result}
    end
  end

  defp durably(call, :resume, opts) do
    {id, opts} = Keyword.pop(opts, :id)
    Durable.resume(call.server, id, opts)
  end

  defp durably(call, _inputs, opts), do: Durable.run(call.server, call.args, opts)

  # Its own definition/0 may have another id than `use`.
  defp identified(spec) do
    case Declared.one(spec.module) do
      {:ok, {id, _definition}} -> {:ok, %{spec | id: id}}
      {:error, text} -> refused("#{inspect(spec.module)}: #{text}")
    end
  end

  @doc "The same as a stream."
  @spec stream(Spec.t(), term(), term()) :: Enumerable.t()
  def stream(spec, inputs, opts) do
    with {:ok, spec} <- identified(spec),
         {:ok, call, opts} <- prepare(spec, inputs, opts, of_stream()) do
      keys = Map.new(spec.fields, &{&1.name, &1.key})

      call.server
      |> call.client.stream(call.args, opts)
      |> Stream.map(&element(spec, call, keys, &1))
    else
      {:error, error} -> [error: error]
    end
  end

  defp element(_spec, _call, keys, {:chunk, name, text}),
    do: {:chunk, Map.get(keys, name, name), text}

  defp element(_spec, _call, keys, {:reset, name}), do: {:reset, Map.get(keys, name, name)}
  defp element(spec, _call, _keys, {:item, index, result}), do: {:item, index, item(spec, result)}
  defp element(_spec, _call, _keys, {:status, text}), do: {:status, text}
  defp element(spec, call, _keys, last), do: result(spec, call, last)

  defp of_stream, do: Client.Options.of_stream()

  defp prepare(spec, inputs, opts, names) do
    known = for key <- @own ++ names, do: {key, if(key == :meta, do: :boolean, else: :any)}

    with {:ok, opts} <- Table.check(opts, known),
         {own, opts} = Keyword.split(opts, @own),
         {:ok, inputs} <- inputs(spec, inputs) do
      server = own[:server] || spec.server || client(Pool)

      args =
        for {key, value} when key != :server and value != nil <- own,
            into: %{program_id: spec.id, inputs: inputs},
            do: {key, if(Keyword.keyword?(value), do: Map.new(value), else: value)}

      {:ok, %{client: client(server), server: server, args: args},
       Tools.add(opts, spec.functions)}
    else
      {:error, text} when is_binary(text) -> refused(text)
      {:error, error} -> {:error, error}
    end
  end

  # The batch has to be told from its results.
  defp inputs(spec, :resume),
    do: {:ok, if(Enum.any?(spec.fields, &(&1.name == "results")), do: %{}, else: [])}

  defp inputs(spec, inputs), do: Inputs.read(spec, inputs)

  defp refused(text), do: {:error, Error.new(:invalid_request, text)}

  @doc "The module with the functions for a server: a pool is known by its handle, any other is a bridge."
  @spec client(term()) :: Pool | Bridge
  def client(server), do: if(Pool.Handle.fetch(server), do: Pool, else: Bridge)

  ## Results

  defp result(spec, %{args: %{inputs: inputs}}, {:ok, %{"results" => results}, meta})
       when is_list(inputs) and is_list(results),
       do: {:ok, Enum.map(results, &item(spec, batched(&1))), meta}

  defp result(spec, _call, {:ok, result, meta}) do
    case to_struct(spec, result) do
      {:ok, struct} -> {:ok, struct, meta}
      {:error, error} -> {:error, %{error | meta: meta}}
    end
  end

  # An error, or a suspended run.
  defp result(_spec, _call, other), do: other

  defp batched(%{"success" => true, "result" => result}), do: {:ok, result}

  defp batched(%{"error" => text} = item) when is_binary(text),
    do: {:error, Error.from_peer(item["error_type"], text, item["retryable"])}

  defp batched(_other), do: {:error, Error.new(:internal, "the peer sent no valid result")}

  defp item(spec, {:ok, result}), do: to_struct(spec, result)
  defp item(_spec, {:error, error}), do: {:error, error}

  defp to_struct(spec, result) do
    with {:error, text} <- Cast.cast(result, {:object, spec.module, fields(spec, result)}, "") do
      text = "the answer did not fit #{inspect(spec.module)}: #{text}"
      {:error, Error.new(:output_invalid, text)}
    end
  end

  # An LM that calls tools natively writes no other output.
  defp fields(spec, %{"tool_calls" => [_ | _]}),
    do: Enum.map(spec.fields, &%Field{&1 | required?: false})

  defp fields(spec, _result), do: spec.fields
end
