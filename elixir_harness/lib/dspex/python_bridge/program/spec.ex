defmodule DSPex.PythonBridge.Program.Spec do
  @moduledoc false
  # The program of a module, read from the options of `use DSPex.PythonBridge.Program` while the module is compiled.

  import DSPex.PythonBridge.Program.Refusal

  alias DSPex.PythonBridge.Options.Table

  alias DSPex.PythonBridge.Program.{
    Dump,
    Field,
    Names,
    StringSignature,
    Tools,
    Types,
    Wire
  }

  alias DSPex.PythonBridge.Protocol.Payload

  # Arguments of `create_program` that go to the peer as they are.
  @passed [:lm, :adapter, :config, :options, :demos, :state, :state_path]
  @options [:id, :program_type, :signature, :instructions, :tools, :server | @passed]

  @enforce_keys [:module, :id, :server, :inputs, :outputs, :results, :declared, :definition] ++
                  [:functions]
  defstruct @enforce_keys

  @typedoc """
  `server`: that of `use`, or nil. `results`: the fields that the program type adds to the outputs. `declared`: the
  outputs as `use` has them. `functions`: of the tools.
  """
  @type t :: %__MODULE__{
          module: module(),
          id: String.t(),
          server: term(),
          inputs: [Field.t()],
          outputs: [Field.t()],
          results: [Field.t()],
          declared: keyword(),
          definition: map(),
          functions: %{String.t() => term()}
        }

  @doc "Reads the options of `use`. Raises `CompileError`, which names the wrong one, with the place of the `use`."
  @spec new!(term(), Macro.Env.t()) :: t()
  def new!(opts, env) do
    case catching(fn -> read(opts, env.module) end) do
      {:ok, spec} ->
        spec

      {:error, text} ->
        text = "#{inspect(env.module)}: #{text}"
        raise CompileError, file: env.file, line: env.line, description: text
    end
  end

  @doc "The fields of the struct: the outputs, and those that the program type adds."
  @spec fields(t()) :: [Field.t()]
  def fields(%__MODULE__{outputs: outputs, results: results}), do: outputs ++ results

  @doc "Their keys."
  @spec keys(t()) :: [atom()]
  def keys(spec), do: spec |> fields() |> Enum.map(& &1.key)

  defp read(opts, module) do
    check(opts)
    {tools, functions} = Tools.read(Keyword.get(opts, :tools, []))
    passed = for key <- @passed, Keyword.has_key?(opts, key), do: {key, plain(opts[key], key)}
    kind = kind(opts[:program_type], passed[:options] || %{}, tools)
    signature = signature(opts[:signature])
    inputs = side(signature, :inputs, kind, module)
    outputs = side(signature, :outputs, kind, module)
    if outputs == [], do: refuse("signature.outputs", "expected at least one field")

    for %Field{key: key} <- outputs,
        Enum.any?(inputs, &(&1.key == key)),
        do: refuse("signature.outputs.#{key}", "an input has the same name; choose another")

    results =
      for key <- Names.results(kind), not Enum.any?(outputs, &(&1.key == key)), do: result(key)

    spec = %__MODULE__{
      module: module,
      id: id(Keyword.get(opts, :id, inspect(module))),
      server: opts[:server],
      inputs: inputs ++ more_inputs(kind, inputs),
      outputs: outputs,
      results: results,
      declared: signature[:outputs],
      definition: %{},
      functions: functions
    }

    if tools == [] and "react" in [kind.type, kind.module],
      do: refuse("tools", "react needs at least one; chain_of_thought is the type without tools")

    check_demos(passed[:demos], spec)
    definition = definition(spec, inputs, kind, opts[:instructions], tools, passed)
    for {key, value} <- definition, do: check_json(key, value)
    %{spec | definition: definition}
  end

  defp check(opts) do
    if not Keyword.keyword?(opts),
      do: refuse("use DSPex.PythonBridge.Program", "expected a keyword list")

    for {key, _value} <- opts,
        key not in @options,
        do: refuse("use DSPex.PythonBridge.Program", Table.unknown(key, @options))
  end

  defp id(id) when is_binary(id) and id != "", do: id
  defp id(other), do: refuse("id", "expected a string, got #{shown(other)}")

  defp kind(type, options, tools) do
    type = if is_atom(type) and type != nil, do: Atom.to_string(type), else: type || "predict"
    known = Names.types()

    if not is_binary(type) or not (type in known or String.contains?(type, ":")) do
      meant = if is_binary(type), do: meant(type, known), else: ""
      expected = "expected one of #{Enum.join(known, ", ")}, or package.module:Class"
      refuse("program_type", "unknown type #{shown(type)}#{meant}; #{expected}")
    end

    if not is_map(options), do: refuse("options", "expected a keyword list or a map")
    module = Map.get(options, :module, Map.get(options, "module"))
    %{type: type, module: Payload.string(module) || "predict", tools?: tools != []}
  end

  defp signature(text) when is_binary(text), do: StringSignature.read(text)

  defp signature(signature) do
    cond do
      signature == nil ->
        refuse("signature", "missing; expected one such as [inputs: […], outputs: […]]")

      not Keyword.keyword?(signature) ->
        refuse("signature", "expected [inputs: […], outputs: […]], or a string")

      true ->
        for {key, _fields} <- signature,
            key not in [:inputs, :outputs],
            do: refuse("signature", Table.unknown(key, [:inputs, :outputs]))

        Keyword.validate!(signature, inputs: [], outputs: [])
    end
  end

  defp side(signature, side, kind, module) do
    fields = Types.fields(signature[side], "signature.#{side}", [module])
    for %Field{key: key} <- fields, do: Names.check(key, side, kind, "signature.#{side}.#{key}")
    fields
  end

  defp more_inputs(kind, inputs) do
    for key <- Names.extra_inputs(kind),
        not Enum.any?(inputs, &(&1.key == key)),
        do: %Field{key: key, name: Atom.to_string(key), type: :any, required?: true}
  end

  defp result(key),
    do: %Field{key: key, name: Atom.to_string(key), type: {:optional, :any}, required?: false}

  defp definition(spec, inputs, kind, instructions, tools, passed) do
    if instructions != nil and not is_binary(instructions),
      do: refuse("instructions", "expected a string")

    signature = %{
      inputs: Enum.map(inputs, &Wire.field(&1, :inputs, "signature.inputs.#{&1.name}")),
      outputs: Enum.map(spec.outputs, &Wire.field(&1, :outputs, "signature.outputs.#{&1.name}"))
    }

    signature =
      if instructions, do: Map.put(signature, :instructions, instructions), else: signature

    definition = %{id: spec.id, program_type: kind.type, signature: signature}
    definition = if tools == [], do: definition, else: Map.put(definition, :tools, tools)
    Enum.into(passed, definition)
  end

  # Keyword lists are written as maps.
  defp plain([], key) when key in [:config, :options, :state], do: %{}
  defp plain(value, _key), do: plain(value)

  defp plain([_ | _] = list) do
    if Keyword.keyword?(list),
      do: Map.new(list, fn {key, value} -> {key, plain(value)} end),
      else: Enum.map(list, &plain/1)
  end

  defp plain(%{} = map) when not is_struct(map),
    do: Map.new(map, fn {key, value} -> {key, plain(value)} end)

  defp plain(value), do: Dump.any(value)

  defp check_demos(nil, _spec), do: :ok

  defp check_demos(demos, spec) when is_list(demos) do
    known = Enum.map(spec.inputs ++ fields(spec), & &1.name)

    for {demo, index} <- Enum.with_index(demos) do
      if not is_map(demo),
        do: refuse("demos[#{index}]", "expected a keyword list or a map of fields")

      for {key, _value} <- demo, name = Payload.string(key) || inspect(key), name not in known do
        refuse("demos[#{index}].#{name}", "unknown field#{meant(name, known)}")
      end
    end
  end

  defp check_demos(_other, _spec), do: refuse("demos", "expected a list of demos")

  defp check_json(key, value) do
    with {:error, error} <- Payload.encode(value, Atom.to_string(key)) do
      [where, text] = String.split(error.message, ": ", parts: 2)
      refuse(where, text)
    end
  end
end
