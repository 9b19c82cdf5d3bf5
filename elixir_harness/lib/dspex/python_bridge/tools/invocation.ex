defmodule DSPex.PythonBridge.Tools.Invocation do
  @moduledoc false
  # One call of a tool by a peer, from its frame to the frame of the result, in a process of its own.
  #
  # Whatever the function does, there is one answer: its result, or an error message.

  alias DSPex.PythonBridge.Protocol
  alias DSPex.PythonBridge.OTP.{Ask, ServerGuard}
  alias DSPex.PythonBridge.Telemetry.{Metadata, Span}
  alias DSPex.PythonBridge.Tools.Answer

  # Of a call_key, in hexadecimal digits: as many bits as a UUID.
  @key_digits 32

  @enforce_keys [:port, :id, :frame, :max_frame_bytes]
  defstruct [:port, :id, :frame, :max_frame_bytes]

  @typedoc "The port of a peer, or the process of a `DSPex.PythonBridge.Stub`, which has none."
  @type peer :: port() | pid()
  @typedoc """
  `port`: of the peer that calls, the only one that gets the result. `id`: of the call that it runs; with nil the
  result is sent even if that is over.
  """
  @type t :: %__MODULE__{
          port: peer(),
          id: pos_integer() | nil,
          frame: binary(),
          max_frame_bytes: pos_integer()
        }
  @type bridge :: pid() | {atom(), node()}

  @doc """
  Calls the function, in the calling process, and sends its answer to the process of the call
  (`DSPex.PythonBridge.Tools.Runner`).
  """
  @spec run(t(), pid(), bridge(), callers :: [pid()]) :: :ok
  def run(%__MODULE__{} = invocation, proxy, bridge, callers) do
    Process.put(:"$callers", callers)

    {call, answer} =
      ServerGuard.run(fn -> read(invocation, &serve(&1, invocation, proxy, bridge)) end)

    send(proxy, {:answered, self(), call, answer})
    :ok
  end

  @doc "The answer to a call whose process has ended without one."
  @spec failed(t(), reason :: term()) :: Answer.t() | :unreadable_frame
  def failed(%__MODULE__{} = invocation, reason) do
    {nil, answer} =
      read(invocation, fn {call_id, _, _} ->
        {nil, Answer.error(call_id, Answer.ended(reason))}
      end)

    answer
  end

  @doc """
  Answers, for the bridge, a tool call that no process makes: the run was called without `:tools`, or is over.
  """
  @spec refuse(t(), :not_given | :over) :: :ok
  def refuse(%__MODULE__{port: port} = invocation, why) do
    bridge = self()

    # In a process of its own: frames may be large.
    spawn(fn ->
      refused = fn {call_id, name, _args} ->
        if why == :over,
          do: over(call_id, name),
          else: error(call_id, name, ":tools was not given for this call")
      end

      {nil, answer} = ServerGuard.run(fn -> read(invocation, refused) end)
      result = with %Answer{frame: frame} <- answer, do: {:tool_result, port, nil, frame}
      send(bridge, result)
    end)

    :ok
  end

  defp read(invocation, make) do
    case Protocol.decode_tool_call(invocation.frame) do
      {:ok, call_id, name, args} -> make.({call_id, name, args})
      {:error, call_id, text} -> {nil, Answer.error(call_id, text)}
      {:error, _reason} -> {nil, :unreadable_frame}
    end
  end

  defp over(call_id, name), do: error(call_id, name, "the call that it belongs to is over")
  defp error(call_id, name, text), do: {nil, Answer.error(call_id, Answer.about(name, text))}

  defp serve({call_id, name, args}, invocation, proxy, bridge) do
    # The same for the same arguments, whatever their order.
    digest = :crypto.hash(:sha256, :erlang.term_to_iovec({name, args}, [:deterministic]))

    case Ask.ask(proxy, :infinity, &{:fetch, self(), &1, name, digest}) do
      {:ok, {:run, function, call, {id, about}}} ->
        span = span(about, bridge, name, false)
        {result, how} = Answer.of(fn -> apply_to(function, args, call, id) end)
        answer = answer(result, call_id, name, invocation.max_frame_bytes)
        ended(span, answer, how)
        {call, answer}

      {:ok, {:answered, answer, {_id, about}}} ->
        answer = Answer.to(answer, call_id)
        ended(span(about, bridge, name, true), answer, :returned)
        {nil, answer}

      {:ok, {:unknown, names, {_id, about}}} ->
        text = "it was not given in :tools, which has #{Enum.join(names, ", ")}"
        {nil, answer} = unknown = error(call_id, name, text)
        # The names that are not in :tools are written by an LM.
        ended(span(about, bridge, "unknown", false), answer, :returned)
        unknown

      _over ->
        over(call_id, name)
    end
  end

  defp answer({:end_run, _text} = over, _call_id, _name, _max), do: over
  defp answer(result, call_id, name, max), do: Answer.new(call_id, name, result, max)

  # The events of a tool call, in the process of the tool, have no arguments and no results.
  defp span(about, bridge, tool, remembered?) do
    more = %{bridge: Metadata.name(bridge), tool: tool, remembered?: remembered?}
    Span.start([:tool], Map.merge(about, more))
  end

  defp ended(span, {:end_run, _text}, :returned),
    do: Span.emit(span, :stop, %{}, %{result: :run_ended})

  defp ended(span, answer, :returned), do: Span.emit(span, :stop, %{}, %{result: answer.result})

  defp ended(span, _answer, {kind, reason, stacktrace}),
    do: Span.exception(span, kind, reason, stacktrace)

  defp apply_to(function, args, _call, _run_id) when is_function(function, 1), do: function.(args)

  defp apply_to(function, args, {digest, nth}, run_id) do
    hash = :crypto.hash(:sha256, [run_id, digest, Integer.to_string(nth)])
    key = hash |> Base.encode16(case: :lower) |> binary_part(0, @key_digits)
    function.(args, key)
  end
end
