defmodule DSPex.PythonBridge.Stub.Fields do
  @moduledoc false
  # The names of a program's fields, which the inputs and outputs of its runs are checked with. What else is in a definition is
  # the peer's to check.

  alias DSPex.PythonBridge.Program.{Names, StringSignature}

  # What a program type adds to the outputs of a signature, or to its inputs.
  @added ~w(reasoning rationale trajectory final_reasoning tool_calls completions history termination_reason)

  @typedoc "The names of the inputs and outputs, those of them that may not be missing, and that of the conversation."
  @type t :: %{inputs: names(), outputs: names(), past: String.t() | nil}
  @typep names :: {known :: [String.t()], required :: [String.t()]} | :any

  @doc """
  The fields of a `create_program`'s arguments. What cannot be read may be anything.

      iex> DSPex.PythonBridge.Stub.Fields.of(%{"signature" => "question, more: Optional[str] -> answer"})
      %{inputs: {["question", "more"], ["question"]}, outputs: {["answer"], ["answer"]}, past: nil}
  """
  @spec of(map()) :: t()
  def of(args) do
    with [inputs, outputs] <- sides(args["signature"]) do
      # What a type takes is the peer's to know: in doubt, null or nothing.
      required =
        for {name, type} <- inputs,
            not (type =~ ~r/optional|none|null|default|history/i),
            do: name

      past = for {name, type} <- inputs, type =~ ~r/\A"?\s*(dspy\.)?history\W*\z/i, do: name
      [inputs, outputs] = for side <- [inputs, outputs], do: Enum.map(side, &elem(&1, 0))
      type = args["program_type"] || "predict"
      past = if type in Names.conversing(), do: List.first(past)
      # A module of the user's own returns what it likes.
      own? = String.contains?(type, ":")
      outputs = if own? or outputs == [], do: :any, else: {outputs ++ List.wrap(past), outputs}
      %{inputs: {inputs, required}, outputs: outputs, past: past}
    else
      _unreadable -> %{inputs: :any, outputs: :any, past: nil}
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

  @doc "Outputs with the conversation that goes on, as the peer gives it, where an answer has none."
  @spec gone_on(t() | nil, map(), map()) :: map()
  def gone_on(%{past: past}, inputs, outputs) when past != nil do
    turn = Map.merge(Map.delete(inputs, past), Map.reject(outputs, &(elem(&1, 1) == nil)))
    if outputs[past], do: outputs, else: Map.put(outputs, past, (inputs[past] || []) ++ [turn])
  end

  def gone_on(_none, _inputs, outputs), do: outputs

  @doc "What is wrong with the names of a run's inputs, in the peer's words, or of its outputs; nil if nothing is."
  @spec wrong(t() | nil, :inputs | :outputs, map()) :: String.t() | nil
  def wrong(fields, side, given) do
    with %{^side => {known, required}} <- fields do
      names = Map.keys(given)
      unknown = for name <- names -- (known ++ @added), do: "#{side}.#{name}: unknown field"
      missing = for name <- required -- names, do: "#{side}.#{name}: missing"

      if unknown ++ missing != [],
        do: Enum.join(unknown ++ missing, "; ") <> "; expected " <> Enum.join(known, ", ")
    else
      _any -> nil
    end
  end
end
