defmodule DSPex.PythonBridge.Stub.Definition do
  @moduledoc false
  # The arguments of `create_program`, checked by the peer's rules as far as they need no DSPy: names, forms and what is
  # missing, but not types. And the fields of a definition, which the inputs and outputs of its runs are checked with.

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.Stub.{Arguments, Signature}

  @arguments ~w(id signature program_type lm adapter config options tools demos state state_path)
  @types ~w(predict chain_of_thought react best_of_n refine multi_chain_comparison rlm)
  @in_signature ~w(inputs outputs instructions)
  # What a program type adds to the outputs of a signature.
  @added ~w(reasoning rationale trajectory final_reasoning tool_calls)

  @typedoc "`outputs`: nil if any are valid."
  @type fields :: %{inputs: [{String.t(), required? :: boolean()}], outputs: [String.t()] | nil}

  @doc """
  Checks the arguments of a `create_program`; the error names the argument.

      iex> alias DSPex.PythonBridge.Stub.Definition
      iex> Definition.check(%{"id" => "qa", "signature" => "question -> answer"})
      :ok
      iex> {:error, error} = Definition.check(%{"id" => "qa", "signature" => "question"})
      iex> error.message
      ~s(signature: expected exactly one "->", as in "question -> answer")
  """
  @spec check(map()) :: :ok | {:error, Error.t()}
  def check(args) do
    with :ok <- outside_signature(args),
         :ok <- Arguments.known(args, @arguments, ""),
         :ok <- Arguments.text(args, "id"),
         :ok <- signature_there(args["signature"]),
         :ok <- Arguments.object(args, "config", "an object"),
         :ok <- lm(args["lm"]),
         {:ok, _inputs, _outputs} <- Signature.read(args["signature"]),
         :ok <- type(args["program_type"]),
         :ok <- Arguments.object(args, "options", "an object of the module's settings"),
         do: tools(args)
  end

  defp outside_signature(args) do
    case Enum.find(@in_signature, &is_map_key(args, &1)) do
      nil ->
        :ok

      name ->
        refuse("#{name}: belongs into signature, an object with inputs, outputs and instructions")
    end
  end

  defp signature_there(nil),
    do: refuse("signature: missing; expected text or an object with inputs and outputs")

  defp signature_there(_there), do: :ok

  defp lm(lm) when lm == nil or is_binary(lm) or is_map(lm), do: :ok

  defp lm(_other),
    do: refuse(~s(lm: expected text such as "openai/gpt-4o-mini", or an object with model))

  defp type(nil), do: :ok

  defp type(type) do
    if type in @types or (is_binary(type) and type =~ ":"),
      do: :ok,
      else:
        refuse(
          "program_type: expected one of #{Enum.join(@types, ", ")}, or package.module:Class"
        )
  end

  defp tools(%{"program_type" => "react"} = args)
       when :erlang.map_get("tools", args) in [nil, []],
       do: no_tools()

  defp tools(%{"program_type" => "react"} = args) when not is_map_key(args, "tools"),
    do: no_tools()

  defp tools(_args), do: :ok

  defp no_tools do
    refuse("tools: react needs at least one; chain_of_thought is the program type without tools")
  end

  ## Fields

  @doc "The fields of a definition that is valid."
  @spec fields(map()) :: fields()
  def fields(args) do
    {:ok, inputs, outputs} = Signature.read(args["signature"])
    type = args["program_type"] || "predict"
    inputs = for {name, type} <- inputs, do: {name, required?(type)}
    # Its completions.
    inputs =
      if type == "multi_chain_comparison", do: inputs ++ [{"completions", false}], else: inputs

    %{inputs: inputs, outputs: if(type in @types, do: for({name, _type} <- outputs, do: name))}
  end

  @doc "Checks the names of a run's inputs, with the peer's words."
  @spec check_inputs(fields() | nil, map()) :: :ok | {:error, Error.t()}
  def check_inputs(nil, _inputs), do: :ok

  def check_inputs(%{inputs: fields}, inputs) do
    unknown = for {name, _value} <- inputs, not List.keymember?(fields, name, 0), do: name
    missing = for {name, true} <- fields, not is_map_key(inputs, name), do: name

    case Enum.map(unknown, &"inputs.#{&1}: unknown field") ++
           Enum.map(missing, &"inputs.#{&1}: missing") do
      [] ->
        :ok

      wrong ->
        names = Enum.map_join(fields, ", ", &elem(&1, 0))
        names = if names == "", do: "no inputs", else: names
        refuse(Enum.join(wrong, "; ") <> "; expected #{names}")
    end
  end

  @doc "What is wrong with the names of a run's outputs, or nil."
  @spec misfit(fields() | nil, map()) :: String.t() | nil
  def misfit(fields, _outputs) when fields == nil or fields.outputs == nil, do: nil

  def misfit(%{outputs: fields}, outputs) do
    unknown = Map.keys(outputs) -- (fields ++ @added)
    missing = fields -- Map.keys(outputs)

    case Enum.map(unknown, &"#{&1}: unknown field") ++ Enum.map(missing, &"#{&1}: missing") do
      [] -> nil
      wrong -> "outputs: #{Enum.join(wrong, "; ")}; expected #{Enum.join(fields, ", ")}"
    end
  end

  # In doubt it is not: what a type takes is the peer's to know.
  defp required?(nil), do: true
  defp required?(type) when is_binary(type), do: not (type =~ ~r/optional|none/i)

  defp required?(%{"type" => type} = schema) when is_binary(type),
    do: not is_map_key(schema, "default")

  defp required?(_schema), do: false

  defp refuse(text), do: Arguments.refuse(text)
end
