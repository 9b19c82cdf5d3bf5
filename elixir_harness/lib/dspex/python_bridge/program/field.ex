defmodule DSPex.PythonBridge.Program.Field do
  @moduledoc false
  # A field of a signature, of a nested map or of a struct, as `DSPex.PythonBridge.Program.Types` reads it.

  @enforce_keys [:key, :name, :type, :required?]
  defstruct [:key, :name, :type, :required?, :description, limits: [], more: []]

  @typedoc """
  A type that was read. `:enum`: the values in JSON, in their order, the term of each, and the reverse where that is not
  the term's own JSON. `:object`: of a struct, or of a map. `:loaded`: a type whose value a loader of
  `DSPex.PythonBridge.Program.EctoSchema` makes.
  """
  @type type ::
          :string
          | :integer
          | :float
          | :boolean
          | :map
          | :any
          | {:media, media()}
          | {:time, :date | :time | :datetime | :naive_datetime}
          | {:list, type()}
          | {:map, type()}
          | {:optional, type()}
          | {:enum, [json()], %{json() => term()}, %{atom() => json()}}
          | {:object, module() | nil, [t()]}
          | {:loaded, type(), loader :: term()}

  @typedoc "DSPy's own types; values of `:reasoning` and `:code` are strings."
  @type media :: :image | :audio | :file | :history | :document | :citations | :reasoning | code()
  @type code :: :code | {:code, language :: String.t()}

  @type json :: String.t() | integer()

  @typedoc """
  `key`: in Elixir. `name`: in JSON. `required?`: if not, it may be left out, and is then nil, or what the struct has by
  default. `limits`: `:min` and `:max`. `more`: what only an argument of a tool may have.
  """
  @type t :: %__MODULE__{
          key: atom(),
          name: String.t(),
          type: type(),
          required?: boolean(),
          description: String.t() | nil,
          limits: [min: number(), max: number()],
          more: [default: term(), optional: boolean()]
        }
end
