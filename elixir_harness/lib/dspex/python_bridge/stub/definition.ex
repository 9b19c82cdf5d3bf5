defmodule DSPex.PythonBridge.Stub.Definition do
  @moduledoc false
  # The arguments of `create_program`, checked by the peer's rules as far as they need no DSPy: names, forms and what is
  # missing, but not types. And the fields of a definition, which the inputs and outputs of its runs are checked with.

  alias DSPex.PythonBridge.Error

  @arguments ~w(id signature program_type lm adapter config options tools demos state state_path)
  @signature ~w(inputs outputs instructions name description)
  @field ~w(name type description desc)
  @types ~w(predict chain_of_thought react best_of_n refine multi_chain_comparison program_of_thought code_act rlm)
  # What a program type adds to the outputs of a signature.
  @added ~w(reasoning rationale trajectory final_reasoning tool_calls)
  # Python's keywords, and names that are parameters of DSPy's.
  @keywords ~w(False None True and as assert async await break class continue def del elif else except finally for from
               global if import in is lambda nonlocal not or pass raise return try while with yield)
  @not_as_input ~w(self instance signature demos config lm new_signature completions prediction)
  # A name that is so similar was probably meant.
  @near 0.85

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
    with :ok <- known(args, @arguments, ""),
         :ok <- text(args, "id"),
         :ok <- signature_there(args["signature"]),
         :ok <- object(args, "config", "an object"),
         :ok <- lm(args["lm"]),
         {:ok, inputs, outputs} <- read(args["signature"]),
         :ok <- fields_ok(inputs, outputs),
         :ok <- type(args["program_type"]),
         :ok <- object(args, "options", "an object of the module's settings"),
         do: tools(args)
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
    {:ok, inputs, outputs} = read(args["signature"])
    type = args["program_type"] || "predict"
    inputs = for {name, type, _where} <- inputs, do: {name, required?(type)}
    # Its completions.
    inputs =
      if type == "multi_chain_comparison", do: inputs ++ [{"completions", false}], else: inputs

    %{inputs: inputs, outputs: if(type in @types, do: for({name, _, _} <- outputs, do: name))}
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

  ## Signatures: {:ok, inputs, outputs}, each field {name, type, where}

  defp read(text) when is_binary(text) do
    case String.split(text, "->") do
      [inputs, outputs] ->
        {:ok, side(inputs, "signature.inputs"), side(outputs, "signature.outputs")}

      _others ->
        refuse(~s(signature: expected exactly one "->", as in "question -> answer"))
    end
  end

  defp read(%{} = signature) do
    with :ok <- known(signature, @signature, "signature"),
         {:ok, inputs} <- fields(signature["inputs"], "signature.inputs"),
         {:ok, outputs} <- fields(signature["outputs"], "signature.outputs"),
         do: {:ok, inputs, outputs}
  end

  defp read(_other) do
    refuse(
      ~s(signature: expected text \("question -> answer"\) or an object with inputs and outputs)
    )
  end

  defp side(text, where) do
    for field <- split(text), String.trim(field) != "" do
      case String.split(field, ":", parts: 2) do
        [name] -> {String.trim(name), nil, where}
        [name, type] -> {String.trim(name), String.trim(type), where}
      end
    end
  end

  # At the commas outside of brackets and quotes.
  defp split(text), do: split(String.graphemes(text), 0, nil, "", [])

  defp split([], _depth, _quote, field, fields), do: Enum.reverse([field | fields])

  defp split([char | rest], depth, nil, field, fields) do
    cond do
      char == "," and depth == 0 -> split(rest, 0, nil, "", [field | fields])
      char in ["[", "(", "<", "{"] -> split(rest, depth + 1, nil, field <> char, fields)
      char in ["]", ")", ">", "}"] -> split(rest, depth - 1, nil, field <> char, fields)
      char in ["\"", "'"] -> split(rest, depth, char, field <> char, fields)
      true -> split(rest, depth, nil, field <> char, fields)
    end
  end

  defp split([char | rest], depth, quote, field, fields),
    do: split(rest, depth, if(char != quote, do: quote), field <> char, fields)

  defp fields(list, where) when is_list(list) do
    list
    |> Enum.with_index()
    |> Enum.reduce_while({:ok, []}, fn {field, index}, {:ok, fields} ->
      here = "#{where}[#{index}]"

      with :ok <- field_object(field, here),
           :ok <- known(field, @field, here) do
        {:cont, {:ok, fields ++ [{field["name"], field["type"], here}]}}
      else
        error -> {:halt, error}
      end
    end)
  end

  defp fields(_other, where), do: refuse("#{where}: expected a list of fields")

  defp field_object(%{}, _where), do: :ok

  defp field_object(_other, where) do
    refuse(~s(#{where}: expected an object such as {"name": "question", "type": "str"}))
  end

  defp fields_ok(_inputs, []), do: refuse("signature.outputs: expected at least one field")

  defp fields_ok(inputs, outputs) do
    all = for field <- inputs, do: {field, @not_as_input}
    all = all ++ for field <- outputs, do: {field, []}
    names = Enum.map(all, fn {{name, _type, _where}, _reserved} -> name end)

    all
    |> Enum.with_index()
    |> Enum.find_value(:ok, fn {{{name, _type, where}, reserved}, index} ->
      cond do
        text = wrong_name(name) ->
          refuse("#{where}.name: #{text}")

        name in Enum.take(names, index) ->
          refuse("#{where}.name: '#{name}' is used twice; expected distinct names")

        name in reserved ->
          refuse("#{where}.name: '#{name}' is reserved by DSPy; choose another name")

        true ->
          nil
      end
    end)
  end

  defp wrong_name(name) when not is_binary(name) or name == "", do: "expected text"

  defp wrong_name(name) do
    cond do
      not (name =~ ~r/\A\p{L}[\p{L}\p{N}_]*\z/u) or name in @keywords ->
        "'#{name}' is not a field name; expected letters, digits and _, not a keyword"

      String.starts_with?(name, "dspy_") ->
        "'#{name}': DSPy hides fields that start with dspy_; choose another name"

      true ->
        nil
    end
  end

  ## Parts that other commands use, too

  @doc "Checks that an argument is a string that is not empty."
  @spec text(map(), String.t()) :: :ok | {:error, Error.t()}
  def text(args, name) do
    if is_binary(args[name]) and args[name] != "", do: :ok, else: refuse("#{name}: expected text")
  end

  @doc "Checks that an argument is an object, or absent."
  @spec object(map(), String.t(), String.t()) :: :ok | {:error, Error.t()}
  def object(args, name, expected) do
    if args[name] == nil or is_map(args[name]),
      do: :ok,
      else: refuse("#{name}: expected #{expected}")
  end

  @doc "Refuses keys that are not known. `where`: the object that has them; the arguments if empty."
  @spec known(map(), [String.t()], String.t()) :: :ok | {:error, Error.t()}
  def known(given, known, where) do
    case Enum.find(Map.keys(given), &(&1 not in known)) do
      nil ->
        :ok

      name ->
        text =
          if where == "", do: "#{name}: unknown argument", else: "#{where}: unknown key #{name}"

        near = nearest(name, known)
        meant = if near, do: "did you mean #{near}? ", else: ""
        refuse("#{text}; #{meant}expected #{Enum.join(known, ", ")}")
    end
  end

  @doc "The name that a misspelt one probably means, or nil."
  @spec nearest(String.t(), [String.t()]) :: String.t() | nil
  def nearest(name, known) do
    nearest = Enum.max_by(known, &likeness(name, &1))
    if likeness(name, nearest) >= @near, do: nearest
  end

  # As Python's difflib: of all characters, those in common.
  defp likeness(one, other) do
    same = for {:eq, text} <- String.myers_difference(one, other), do: String.length(text)
    2 * Enum.sum(same) / (String.length(one) + String.length(other))
  end

  defp refuse(text), do: {:error, Error.new(:invalid_args, text)}
end
