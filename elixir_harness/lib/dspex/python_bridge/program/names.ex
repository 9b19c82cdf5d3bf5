defmodule DSPex.PythonBridge.Program.Names do
  @moduledoc false
  # Which fields a program type has, and which names the fields of a signature may have: the rules of the peer's
  # `signatures/builder.py` and `programs/module_factory.py`, with which a test compares them.

  import DSPex.PythonBridge.Program.Refusal

  # The keywords of Python that could be names in Elixir.
  @keywords ~w(as assert async await break class continue def del elif except finally for from global if import is
               lambda nonlocal pass raise return try while with yield False None True and or not in else)a
  # The attributes of every DSPy signature, in DSPy 3.4.
  @attributes ~w(append append_instructions construct copy delete dict dump_state equals fields from_orm input_fields
                 insert instructions json load_state model_computed_fields model_config model_construct model_copy
                 model_dump model_dump_json model_extra model_fields model_fields_set model_json_schema
                 model_parametrized_name model_post_init model_rebuild model_validate model_validate_json
                 model_validate_strings mro output_fields parse_file parse_obj parse_raw prepend register schema
                 schema_json signature update_forward_refs validate with_instructions with_updated_fields)a
  @not_as_input ~w(self instance demos config lm new_signature completions prediction)a

  # Fields and arguments of DSPy's modules; of some only in inputs, or in outputs.
  @own %{
    "chain_of_thought" => [:reasoning],
    "react" =>
      ~w(trajectory next_thought next_tool_name next_tool_args tool_calls max_iters reasoning termination_reason)a,
    "refine" => [:hint_],
    "multi_chain_comparison" => [:rationale],
    "rlm" =>
      ~w(trajectory final_reasoning variables_info repl_history iteration interpreter_factory)a,
    {"react", :inputs} => [:module, :tools],
    {"react", :outputs} => [:self, :history],
    {"rlm", :outputs} => [:self]
  }

  # Results in addition to the outputs.
  @results %{
    "chain_of_thought" => [:reasoning],
    "react" => [:reasoning, :trajectory, :history, :termination_reason],
    "multi_chain_comparison" => [:rationale],
    "rlm" => [:trajectory, :final_reasoning]
  }
  @several ["best_of_n", "refine"]
  @calling_tools ["predict", "chain_of_thought"]
  @converse @several ++ ["react" | @calling_tools]

  @typedoc "What decides it: `module` is the option of that name; `tools?` is whether there are tools."
  @type kind :: %{type: String.t(), module: String.t(), tools?: boolean()}

  @doc "The names of DSPy's program types."
  @spec types() :: [String.t()]
  def types, do: ~w(predict chain_of_thought react best_of_n refine multi_chain_comparison rlm)

  @doc """
  The fields of a result in addition to the signature's outputs.

      iex> DSPex.PythonBridge.Program.Names.results(%{type: "refine", module: "react", tools?: true})
      [:reasoning, :trajectory, :history, :termination_reason]
  """
  @spec results(kind()) :: [atom()]
  def results(%{type: type, module: module}) when type in @several,
    do: Map.get(@results, module, [])

  def results(%{type: type, tools?: tools?}) do
    own = if tools?, do: [:tool_calls], else: [:completions]
    Map.get(@results, type, []) ++ if(type in @calling_tools, do: own, else: [])
  end

  @doc "The inputs in addition to the signature's, which may declare them too, with their types."
  @spec extra_inputs(kind()) :: keyword()
  def extra_inputs(%{type: "multi_chain_comparison"}), do: [completions: :any]
  # The conversation.
  def extra_inputs(%{type: "react"}), do: [history: {:optional, :any}]

  def extra_inputs(%{type: type, module: "react"}) when type in @several,
    do: [history: {:optional, :any}]

  def extra_inputs(_kind), do: []

  @doc "The program types whose results have the conversation."
  @spec conversing() :: [String.t()]
  def conversing, do: @converse

  @doc """
  The conversation, an input and a result: of these inputs of the type history the first, or that which agents have. nil if
  there is none, or if the peer gives none for the program type.
  """
  @spec conversation(kind(), [atom()]) :: atom() | nil
  def conversation(%{type: type} = kind, inputs) when type in @converse do
    own = Keyword.keys(extra_inputs(kind))
    Enum.find(inputs, List.first(inputs ++ own), &(&1 in own))
  end

  def conversation(_kind, _inputs), do: nil

  @doc "Checks the name of a field of a signature."
  @spec check(atom(), :inputs | :outputs, kind(), String.t()) :: :ok
  def check(name, side, kind, where) do
    text = Atom.to_string(name)

    cond do
      String.starts_with?(text, ["_", "dspy_"]) ->
        refuse(where, "names that begin with _ or dspy_ are DSPy's; choose another name")

      not (text =~ ~r/\A\p{L}[\p{L}\p{N}_]*\z/u) ->
        refuse(where, "#{shown(text)} is not a field name; expected letters, digits and _")

      name in @keywords ->
        refuse(where, "a keyword of Python, in which the name is used too; choose another name")

      name in @attributes ->
        refuse(where, "an attribute of every DSPy signature; choose another name")

      side == :inputs and name in (@not_as_input -- Keyword.keys(extra_inputs(kind))) ->
        refuse(where, "reserved by DSPy; choose another name")

      true ->
        check_own(name, text, side, kind, where)
    end
  end

  defp check_own(name, text, side, kind, where) do
    type = Enum.find([kind.type, kind.module], &own?(&1, side, name, text))

    cond do
      # The field that the type adds is then the declared one.
      side == :outputs and name == :reasoning ->
        :ok

      type != nil ->
        refuse(where, "#{type} has a field of its own with this name; choose another")

      :tool_calls in results(kind) and name in [:tools, :tool_calls] ->
        refuse(where, "with tools, a field of DSPy's own; choose another name")

      true ->
        :ok
    end
  end

  defp own?("multi_chain_comparison", _side, _name, "reasoning_attempt_" <> _), do: true

  defp own?(type, side, name, _text),
    do: name in Map.get(@own, type, []) or name in Map.get(@own, {type, side}, [])
end
