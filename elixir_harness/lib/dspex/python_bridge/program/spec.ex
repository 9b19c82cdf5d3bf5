defmodule DSPex.PythonBridge.Program.Spec do
  @moduledoc false
  # The program of a module, read from the options of `use DSPex.PythonBridge.Program` while the module is compiled.

  import DSPex.PythonBridge.Program.Refusal

  alias DSPex.PythonBridge.Program.{
    Dump,
    Field,
    Names,
    Settings,
    StringSignature,
    Tools,
    Types,
    Wire
  }

  alias DSPex.PythonBridge.Protocol.Payload

  # Arguments of `create_program` that go to the peer as they are.
  @passed [:lm, :adapter, :config, :options, :demos, :state, :state_path]
  @options [:id, :program_type, :signature, :instructions, :tools, :server | @passed]

  @enforce_keys [:module, :id, :server, :inputs, :fields, :declared, :definition, :functions]
  defstruct @enforce_keys

  @typedoc """
  `server`: that of `use`, or nil. `fields`: the outputs, and those that the program type adds. `declared`: the outputs as
  `use` has them. `functions`: of the tools.
  """
  @type t :: %__MODULE__{
          module: module(),
          id: String.t(),
          server: term(),
          inputs: [Field.t()],
          fields: [Field.t()],
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

  defp read(opts, module) do
    keyword!(opts, "use DSPex.PythonBridge.Program", @options)
    {tools, functions} = Tools.read(Keyword.get(opts, :tools, []))
    passed = for key <- @passed, Keyword.has_key?(opts, key), do: {key, plain(opts[key], key)}
    kind = kind(opts[:program_type], passed[:options] || %{}, tools)
    declared = signature(opts[:signature])
    inputs = side(declared, :inputs, kind, module)
    outputs = side(declared, :outputs, kind, module)
    if outputs == [], do: refuse("signature.outputs", "expected at least one field")

    for %Field{key: key} <- outputs,
        Enum.any?(inputs, &(&1.key == key)),
        do: refuse("signature.outputs.#{key}", "an input has the same name; choose another")

    past = for %Field{key: key, type: {:media, :history}} <- inputs, do: key
    past = Names.conversation(kind, past)
    {all, added} = Enum.split_with(Names.results(kind), &(&1 == :completions))
    # That of an agent may have another name.
    added = (added -- [:history]) ++ List.wrap(past)
    added = for key <- added, do: Types.field(key, {:optional, :any}, "", [])

    extra = Keyword.take(Names.extra_inputs(kind), [past, :completions])
    extra = for {key, type} <- extra, do: Types.field(key, type, "", [])
    id = Keyword.get(opts, :id, inspect(module))

    signature =
      Map.merge(Map.new(Keyword.take(opts, [:instructions])), %{
        inputs: Enum.map(inputs, &Wire.field(&1, :inputs, "signature.inputs.#{&1.name}")),
        outputs: Enum.map(outputs, &Wire.field(&1, :outputs, "signature.outputs.#{&1.name}"))
      })

    # What is declared has the declared type.
    fields = Enum.uniq_by(outputs ++ added, & &1.key)
    # All answers of an LM that is asked for several are structs, too.
    all =
      for key <- all,
          do: %{Types.field(key, {:optional, :any}, "", []) | type: answers(module, fields)}

    fields = Enum.uniq_by(fields ++ all, & &1.key)
    inputs = Enum.uniq_by(inputs ++ extra, & &1.key)
    # None begins it.
    inputs = for field <- inputs, do: %{field | required?: field.required? and field.key != past}
    Settings.check(passed, kind.type, inputs ++ fields)

    if tools == [] and "react" in [kind.type, kind.module],
      do: refuse("tools", "react needs at least one; chain_of_thought is the type without tools")

    definition = Map.new([id: id, program_type: kind.type, signature: signature] ++ passed)
    definition = if tools == [], do: definition, else: Map.put(definition, :tools, tools)

    %__MODULE__{
      module: module,
      id: id,
      server: opts[:server],
      inputs: inputs,
      fields: fields,
      declared: declared[:outputs],
      definition: definition,
      functions: functions
    }
  end

  defp answers(module, fields), do: {:optional, {:list, {:object, module, fields}}}

  defp kind(type, options, tools) do
    type = if is_atom(type) and type != nil, do: Atom.to_string(type), else: type || "predict"
    known = Names.types()

    if not is_binary(type) or not (type in known or String.contains?(type, ":")) do
      expected = "expected one of #{Enum.join(known, ", ")}, or package.module:Class"
      refuse("program_type", "unknown type #{shown(type)}; #{expected}")
    end

    if not is_map(options), do: refuse("options", "expected a keyword list or a map")
    module = Map.get(options, :module, Map.get(options, "module"))
    %{type: type, module: Payload.string(module) || "predict", tools?: tools != []}
  end

  defp signature(text) when is_binary(text), do: StringSignature.read(text)

  defp signature(signature) do
    expected = "[inputs: […], outputs: […]], or a string"
    keyword!(signature, "signature", [:inputs, :outputs], expected)
    Keyword.merge([inputs: [], outputs: []], signature)
  end

  defp side(signature, side, kind, module) do
    fields = Types.fields(signature[side], "signature.#{side}", [module])
    for %Field{key: key} <- fields, do: Names.check(key, side, kind, "signature.#{side}.#{key}")
    fields
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
end
