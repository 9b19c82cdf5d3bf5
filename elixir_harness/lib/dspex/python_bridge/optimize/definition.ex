defmodule DSPex.PythonBridge.Optimize.Definition do
  @moduledoc false
  # The program that is optimized: a definition as `create_program` takes it, and the one that comes out.

  alias DSPex.PythonBridge.{Program, Programs, Protocol}
  alias DSPex.PythonBridge.Programs.Change
  alias DSPex.PythonBridge.Protocol.Payload

  # What a state takes the place of.
  @replaced [:state, :state_path, :demos]
  @expected "definition: expected a map with an id and what else create_program takes, or a module with " <>
              "`use DSPex.PythonBridge.Program`"

  @enforce_keys [:id, :given, :tools, :spec]
  defstruct @enforce_keys

  @typedoc """
  `given`: the definition. `tools`: the names of its tools. `spec`: the program, if it is a module's, which has functions for them.
  """
  @type t :: %__MODULE__{
          id: String.t(),
          given: map(),
          tools: [String.t()],
          spec: Program.Spec.t() | nil
        }

  @doc "Reads a definition, or gives the text that refuses it."
  @spec new(term()) :: {:ok, t()} | {:error, String.t()}
  def new(module) when is_atom(module) and module not in [nil, true, false] do
    case Programs.Declared.one(module) do
      {:ok, _declared} -> read(module.definition(), Program.Tools.spec(module))
      {:error, text} -> {:error, "definition: #{inspect(module)}: #{text}"}
    end
  end

  def new(map) when is_map(map) and not is_struct(map), do: read(map, nil)
  def new(_other), do: {:error, @expected}

  defp read(definition, spec) do
    id = Change.program_id(:create_program, definition)

    if id != nil and String.valid?(id) do
      with {:ok, body} <- encode(definition) do
        %{tools: tools} = Programs.Body.read(body)
        {:ok, %__MODULE__{id: id, given: definition, tools: tools, spec: spec}}
      end
    else
      {:error, @expected}
    end
  end

  defp encode(definition) do
    with {:error, error} <-
           Programs.Declared.encode(
             Map.new(definition, fn {key, value} -> {name(key), value} end)
           ),
         do: {:error, "definition: " <> error.message}
  end

  defp name(key), do: Payload.string(key) || key

  @doc "The body of the request that creates it under another id."
  @spec create(t(), String.t()) :: binary()
  def create(%__MODULE__{given: given}, id) do
    {:ok, body} = Protocol.encode_body(:create_program, put(given, :id, id))
    body
  end

  @doc "The definition with a state, which has the demos."
  @spec with_state(t(), map()) :: map()
  def with_state(%__MODULE__{given: given}, state) do
    names = @replaced ++ Enum.map(@replaced, &Atom.to_string/1)
    put(Map.drop(given, names), :state, state)
  end

  @doc "The state that it has itself, or nil."
  @spec state(t()) :: map() | nil
  def state(%__MODULE__{given: given}), do: given[:state] || given["state"]

  # The keys of a definition are atoms or strings, as it has its id.
  defp put(given, key, value) do
    if is_map_key(given, :id),
      do: Map.put(given, key, value),
      else: Map.put(given, Atom.to_string(key), value)
  end
end
