defmodule DSPex.PythonBridge.Program do
  @moduledoc """
  A program as a module: a struct of its outputs, and functions that run it.

      defmodule MyApp.Triage do
        use DSPex.PythonBridge.Program,
          program_type: "chain_of_thought",
          signature: [
            inputs: [ticket: :string],
            outputs: [
              team: {:enum, ["billing", "support"]},
              urgent: {:boolean, "must be handled today"}
            ]
          ],
          instructions: "Route the ticket."
      end

      # In the supervision tree; the peers create it before the first call.
      {DSPex.PythonBridge.Pool, name: MyApp.Pool, programs: [MyApp.Triage]}

      {:ok, %MyApp.Triage{team: "billing", urgent: true, reasoning: _}} =
        MyApp.Triage.run(%{ticket: "I was charged twice!"}, server: MyApp.Pool, timeout: 30_000)

  Wrong names and types are errors of the compiler, which name the field.

  ## Options of `use`

    * `:signature` – `[inputs: […], outputs: […]]`, see below; or DSPy's string form with simple types,
      `"question -> answer: float"`
    * `:program_type` – a string or an atom; by default `"predict"`. docs/protocol.md lists them
    * `:instructions` – what the LM is to do
    * `:id` – the program's id; by default the module's name, such as `"MyApp.Triage"`
    * `:server` – the bridge or pool of its runs, if they name none
    * `:tools` – a keyword list of `:description`, `:args`, which are written as fields are, and `:function`, which is a
      function of a module or `{function, options}`: `[stock: [args: [sku: :string], function: &MyApp.Stock.find/1]]`.
      It is called as one of a run's `:tools`, which take the place of those with the same names. An argument may also have
      a `:default`, or `optional: true`: `most: {:integer, default: 10}`. docs/guide/agents.md says what is called then.
      In place of `:args` a tool may have `:parameters`, a JSON Schema: `%{type: "object", properties: %{…}}`
    * `:lm`, `:adapter`, `:config`, `:options`, `:demos`, `:state`, `:state_path` – as in docs/protocol.md; keyword lists
      may take the place of maps

  They are evaluated when the module is compiled, so keys of an LM do not belong here. `definition/0` can be overridden, and
  each run asks it for the program's id:

      def definition, do: Map.put(super(), :lm, Application.fetch_env!(:my_app, :triage_lm))

  ## Functions of the module

    * `run(inputs, opts \\\\ [])` – `{:ok, struct}`, or `{:error, %DSPex.PythonBridge.Error{}}`, which names the field
    * `stream(inputs, opts \\\\ [])` – the elements of `DSPex.PythonBridge.Bridge.stream/3`, with the names of the
      module's fields as atoms: `{:chunk, :reasoning, text}`, `{:reset, :reasoning}`, `{:status, text}` and,
      always last, `{:ok, struct, meta}` or `{:error, error}`
    * `durable(inputs, opts \\\\ [])` – `run` that outlives its process, its node and a deploy, or `{:suspended, run}`: see
      `DSPex.PythonBridge.Durable`, whose options it has. `:resume` in place of the inputs goes on with a run that is there
    * `definition()` – the arguments of `create_program`, for `programs:` in the options of a Bridge, Pool or Supervisor,
      or for `Bridge.call(:create_program, MyApp.Triage.definition())`

  `inputs` is a map, a keyword list or a struct, with atoms or strings as keys. Missing and unknown names are refused before
  anything is sent. Structs in it become maps, if they declare their fields (see below) or are types of the signature. A list
  of inputs that is not empty is a batch: `{:ok, [{:ok, struct} | {:error, error}]}`, and in a stream `{:item, index, {:ok, struct}}`.

  Options of `run` and `stream` are those of `DSPex.PythonBridge.Bridge.request/4`, of which a stream has no `:on_chunk`, and:

    * `:server` – by default that of `use`; else the Pool with its default name, if that is running, else the Bridge
    * `:meta` – of `run`: with true it returns `{:ok, struct, meta}`
    * `:lm`, `:config` – for this run

  ## Fields

  A field is `name: type`, `name: {type, "description"}`, or `name: {type, description: "…", min: 1, max: 5}`. `:min` and
  `:max` are the limits of a number, or of the length of a string or list. The struct has the outputs, and what the program
  type adds: `reasoning`, `trajectory`, `history`, `termination_reason`, `rationale`, `final_reasoning`, `tool_calls`, which
  are nil if they are absent, and `completions`: with `config: [n: 3]` a list of three such structs, else nil. Of a module
  of your own in Python it has the outputs alone. An input of the type `:history` is the conversation: it may be left out, and
  the struct has it, too, with the new turn, to be passed on. A `react` has one without a declaration, `history`.

  | type | in Elixir |
  | --- | --- |
  | `:string`, `:integer`, `:float`, `:boolean` | themselves |
  | `:map`, `:any` | decoded JSON: maps have string keys |
  | `{:list, type}`, `{:map, type}` | a list; a map with string keys |
  | `{:enum, ["a", "b"]}`, `{:enum, [:a, :b]}`, `{:enum, [1, 2]}` | one of the values: of atoms, an atom |
  | `{:optional, type}` | nil or the type; the name may be left out |
  | `%{name: :string, age: :integer}` | a map with these atoms as keys |
  | `MyApp.Address` | a struct: of a module that declares its fields, or an embedded schema of Ecto |
  | `:date`, `:time`, `:datetime`, `:naive_datetime` | `Date`, `Time`, `DateTime` (in UTC, also if the LM names no offset), `NaiveDateTime` |
  | `:uuid` | a string |
  | `:reasoning`, `:code`, `{:code, "java"}` | a string: what an LM thinks, code without the block of Markdown around it |
  | `:document` | as an input: a string, or a map with `data`, and `title`, `media_type`, `context` |
  | `:citations` | as an output: a list of maps with string keys, or nil |
  | `:image`, `:audio`, `:file`, `:history` | as in docs/protocol.md; in lists too |

  A value that does not fit is an error of the type `:output_invalid`, whose message names the field:
  `order.items[0].count: expected a whole number`. No atom is made from an answer.

  ## Structs as types

  A module declares its fields with `__dspex__/1`, as the modules of programs do:

      defmodule MyApp.Address do
        defstruct [:street, :city]

        def __dspex__(:fields), do: [street: :string, city: {:string, "without the postal code"}]
      end

  Fields of its struct that it does not name keep their defaults.

  An embedded schema of Ecto needs nothing: its fields are read through `__schema__`, without the primary key. Fields
  with a default may be left out, all others are required, since Ecto does not tell. Enums, embeds, arrays, maps, decimals,
  dates and custom types with a JSON form work. Changesets do not run. A schema with `__dspex__/1` is taken at its word, as any
  other struct.
  """

  alias DSPex.PythonBridge.{Bridge, Durable, Error}

  @type inputs :: map() | keyword()
  @typedoc "One run's inputs, or a batch."
  @type given :: inputs() | [inputs()]
  @type option ::
          Bridge.request_option()
          | {:server, Bridge.server()}
          | {:meta, boolean()}
          | {:lm, String.t() | map() | keyword()}
          | {:config, map() | keyword()}
  @type results(struct) :: struct | [{:ok, struct} | {:error, Error.t()}]
  @typedoc "What `run` returns: with `meta: true` there is `meta`; of a list of inputs there is a list of results."
  @type result(struct) ::
          {:ok, results(struct)} | {:ok, results(struct), meta :: map()} | {:error, Error.t()}
  @type stream_element(struct) ::
          {:chunk, field :: atom() | String.t(), text :: String.t()}
          | {:reset, field :: atom() | String.t()}
          | {:status, String.t()}
          | {:item, non_neg_integer(), {:ok, struct} | {:error, Error.t()}}
          | {:ok, results(struct), meta :: map()}
          | {:error, Error.t()}

  @type durable_result(struct) ::
          result(struct) | {:suspended, Durable.Run.t()} | {:error, :claimed | :not_found}

  @doc "The arguments of `create_program`: a map with a JSON form."
  @callback definition() :: map()
  @doc "Runs the program."
  @callback run(given(), [option()]) :: result(struct())
  @doc "Runs the program as a lazy stream."
  @callback stream(given(), [option()]) :: Enumerable.t(stream_element(struct()))
  @doc "Makes a durable run of the program, or goes on with one."
  @callback durable(given() | :resume, keyword()) :: durable_result(struct())

  @doc false
  defmacro __using__(opts) do
    quote bind_quoted: [opts: opts] do
      alias DSPex.PythonBridge.Program
      alias DSPex.PythonBridge.Program.{Runner, Spec}

      @behaviour Program
      @dspex_program Spec.new!(opts, __ENV__)

      defstruct Enum.map(@dspex_program.fields, & &1.key)

      @typedoc "The outputs of the program."
      @type t :: %__MODULE__{}

      @doc "The arguments of `create_program`."
      @impl Program
      @spec definition() :: map()
      def definition, do: @dspex_program.definition
      defoverridable definition: 0

      @doc "Runs the program: see `DSPex.PythonBridge.Program`."
      @impl Program
      @spec run(Program.given(), [Program.option()]) :: Program.result(t())
      def run(inputs, opts \\ []), do: Runner.run(@dspex_program, inputs, opts)

      @doc "Runs the program as a stream: see `DSPex.PythonBridge.Program`."
      @impl Program
      @spec stream(Program.given(), [Program.option()]) ::
              Enumerable.t(Program.stream_element(t()))
      def stream(inputs, opts \\ []), do: Runner.stream(@dspex_program, inputs, opts)

      @doc "Makes a durable run of the program: see `DSPex.PythonBridge.Durable`."
      @impl Program
      @spec durable(Program.given() | :resume, keyword()) :: Program.durable_result(t())
      def durable(inputs, opts \\ []), do: Runner.durable(@dspex_program, inputs, opts)

      @doc false
      @spec __dspex__(:fields | :spec) :: keyword() | Spec.t()
      def __dspex__(:fields), do: @dspex_program.declared
      def __dspex__(:spec), do: @dspex_program
    end
  end
end
