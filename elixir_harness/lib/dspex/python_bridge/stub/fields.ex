defmodule DSPex.PythonBridge.Stub.Fields do
  @moduledoc false
  # The names of a program's fields, which the inputs and outputs of its runs are checked with. What else is in a definition is
  # the peer's to check.

  alias DSPex.PythonBridge.Program.StringSignature

  # What a program type adds to the outputs of a signature, or to its inputs.
  @added ~w(reasoning rationale trajectory final_reasoning tool_calls completions)

  @typedoc "`required`: the inputs that may not be missing. `outputs`: nil if any are valid."
  @type t :: %{inputs: [String.t()], required: [String.t()], outputs: [String.t()] | nil}

  @doc """
  The fields of a `create_program`'s arguments; nil if its signature cannot be read.

      iex> DSPex.PythonBridge.Stub.Fields.of(%{"signature" => "question, more: Optional[str] -> answer"})
      %{inputs: ["question", "more"], required: ["question"], outputs: ["answer"]}
  """
  @spec of(map()) :: t() | nil
  def of(args) do
    with [inputs, outputs] <- sides(args["signature"]) do
      # A module of the user's own returns what it likes.
      own? = String.contains?(args["program_type"] || "predict", ":")
      # What a type takes is the peer's to know: in doubt, null or nothing.
      required =
        for {name, type} <- inputs, not (type =~ ~r/optional|none|null|default/i), do: name

      [inputs, outputs] = for side <- [inputs, outputs], do: Enum.map(side, &elem(&1, 0))
      %{inputs: inputs, required: required, outputs: if(not own?, do: outputs)}
    else
      _unreadable -> nil
    end
  end

  defp sides(%{"inputs" => inputs, "outputs" => outputs}),
    do: for(side <- [inputs, outputs], do: Enum.map(side, &{&1["name"], inspect(&1["type"])}))

  defp sides(text) when is_binary(text) do
    for side <- String.split(text, "->") do
      for field <- StringSignature.split(side), String.trim(field) != "" do
        [name | type] = String.split(field, ":", parts: 2)
        {String.trim(name), Enum.join(type)}
      end
    end
  end

  defp sides(_none), do: nil

  @doc "What is wrong with the names of a run's inputs, with the peer's words, or nil."
  @spec wrong_inputs(t() | nil, term()) :: String.t() | nil
  def wrong_inputs(_fields, inputs) when not is_map(inputs),
    do: "inputs: expected an object of the signature's input fields"

  def wrong_inputs(nil, _inputs), do: nil
  def wrong_inputs(of, inputs), do: wrong("inputs.", of.inputs, of.required, inputs)

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
