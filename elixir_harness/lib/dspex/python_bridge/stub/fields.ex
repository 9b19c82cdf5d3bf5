defmodule DSPex.PythonBridge.Stub.Fields do
  @moduledoc false
  # The names of a program's fields, which the inputs and outputs of its runs are checked with. What else is in a definition is
  # the peer's to check.

  alias DSPex.PythonBridge.Program.StringSignature

  # What a program type adds to the outputs of a signature, or to its inputs.
  @added ~w(reasoning rationale trajectory final_reasoning tool_calls completions)

  @typedoc "`outputs`: nil if any are valid."
  @type t :: %{inputs: [{String.t(), required? :: boolean()}], outputs: [String.t()] | nil}

  @doc """
  The fields of a `create_program`'s arguments; nil if its signature cannot be read.

      iex> alias DSPex.PythonBridge.Stub.Fields
      iex> Fields.of(%{"signature" => "question, more: Optional[str] -> answer"})
      %{inputs: [{"question", true}, {"more", false}], outputs: ["answer"]}
  """
  @spec of(map()) :: t() | nil
  def of(%{"signature" => text} = args) when is_binary(text) do
    with [inputs, outputs] <- String.split(text, "->"),
         do: new(args, side(inputs), side(outputs)),
         else: (_one_side -> nil)
  end

  def of(%{"signature" => %{"inputs" => inputs, "outputs" => outputs}} = args),
    do: new(args, Enum.map(inputs, &field/1), Enum.map(outputs, &field/1))

  def of(_args), do: nil

  defp new(args, inputs, outputs) do
    # A module of the user's own returns what it likes.
    own? = String.contains?(args["program_type"] || "predict", ":")
    inputs = for {name, type} <- inputs, do: {name, required?(type)}
    %{inputs: inputs, outputs: if(not own?, do: for({name, _type} <- outputs, do: name))}
  end

  defp field(field), do: {field["name"], field["type"]}

  defp side(text) do
    for field <- StringSignature.split(text), String.trim(field) != "" do
      [name | type] = field |> String.split(":", parts: 2) |> Enum.map(&String.trim/1)
      {name, List.first(type)}
    end
  end

  # In doubt it is not: what a type takes is the peer's to know.
  defp required?(nil), do: true
  defp required?(type) when is_binary(type), do: not (type =~ ~r/optional|none/i)
  defp required?(schema), do: is_binary(schema["type"]) and not is_map_key(schema, "default")

  @doc "What is wrong with the names of a run's inputs, with the peer's words, or nil."
  @spec wrong_inputs(t() | nil, term()) :: String.t() | nil
  def wrong_inputs(_fields, inputs) when not is_map(inputs),
    do: "inputs: expected an object of the signature's input fields"

  def wrong_inputs(nil, _inputs), do: nil

  def wrong_inputs(%{inputs: fields}, inputs) do
    required = for {name, true} <- fields, do: name
    wrong("inputs.", Enum.map(fields, &elem(&1, 0)), required, inputs)
  end

  @doc "What is wrong with the names of a run's outputs, or nil."
  @spec wrong_outputs(t() | nil, map()) :: String.t() | nil
  def wrong_outputs(%{outputs: [_ | _] = fields}, outputs),
    do: wrong("outputs.", fields, fields, outputs)

  def wrong_outputs(_any, _outputs), do: nil

  defp wrong(where, known, required, given) do
    names = Map.keys(given)
    unknown = for name <- names -- (known ++ @added), do: "#{where}#{name}: unknown field"
    missing = for name <- required -- names, do: "#{where}#{name}: missing"

    if unknown ++ missing != [],
      do: Enum.join(unknown ++ missing, "; ") <> "; expected " <> Enum.join(known, ", ")
  end
end
