defmodule DSPex.PythonBridge.Stub do
  @moduledoc """
  Answers the calls of your application in its tests, without Python.

  A stub has the name of the Bridge or Pool that your application calls. All functions of
  `DSPex.PythonBridge.Bridge` and `DSPex.PythonBridge.Pool` work with that name, and so do their timeouts, cancellation,
  tools and telemetry: their code is the same, and arguments and results become JSON and back. Only the answers are yours.

      defmodule MyApp.TicketsTest do
        use ExUnit.Case, async: true

        alias DSPex.PythonBridge.Stub

        setup {Stub, :verify_on_exit!}

        test "an urgent ticket goes to the team at once" do
          Stub.expect(MyApp.Pool, "triage", fn %{"ticket" => "It burns!"} ->
            {:ok, %{"team" => "support", "urgent" => true}}
          end)

          assert MyApp.Tickets.route("It burns!") == {:now, "support"}
        end
      end

  with the stub in place of the pool, under the application's supervisor (docs/testing.md has the whole example) or in
  `test/test_helper.exs`:

      {:ok, _stub} = DSPex.PythonBridge.Stub.start_link(name: MyApp.Pool)

  A test that needs a stub of its own starts it with `start_supervised!({Stub, name: MyApp.Pool, answers: …})`.

  ## Answers

  `expect/3` gives one run of a program its answer, `stub/3` all of them, and the stub's option `:answers` all that no
  test has answered. An answer is a function of the inputs, a map with string keys as it comes from the wire. It runs in a
  process of its own, which is killed when the caller gives up, and returns

    * `{:ok, outputs}`, a map, or a struct of the program's module; `{:ok, outputs, meta}`, with what `meta` has in addition to
      that of a run without LM calls (for a list of inputs, `meta` is not used)
    * `{:error, %DSPex.PythonBridge.Error{}}`; `{:error, text}`, which is one of type `:internal`; or `{:error, type}` with
      `:timeout`, `:overloaded` or `:python_process_died`

  It may take its time, which is how you test a timeout, send chunks with `chunk/2` and `status/1`, and call the tools of
  your application with `call_tool/2`. Without `chunk/2` a stream gets each output that is a string as one chunk. For a list
  of inputs it is called for each of them.

  A function that raises gives an error of type `:internal`, and a run without an answer one of type
  `:program_not_found`. Both are logged, and `verify!/1` and `verify_on_exit!/1` raise for them: your application may have
  rescued the error.

  ## Whose answers

  As with Mox: the answers of `expect/3` and `stub/3` belong to the process that gives them. They serve its own calls, those of
  its tasks (`$callers`) and of the processes that it has started, so that tests with `async: true` may share a stub. A
  process that has been there before, such as a `GenServer` of your application, needs `allow/3`. A cast has no
  caller: it gets the stub's own answer.

  ## Programs

  Programs need not be declared or created. If one is, by the option `:programs` or `create_program`, runs with other
  inputs or outputs than it has are errors, and a conversation that an answer does not give has the turn of the run. The
  rest of its definition is not checked. Programs belong to the stub, as they
  do to a pool.
  """

  alias DSPex.PythonBridge.{Error, Pool}
  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.Programs.Change
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Stub.{Expectations, Peer, Run}

  # Not a dependency: whoever calls it has it.
  @compile {:no_warn_undefined, ExUnit.Callbacks}

  @no_drain %{"DSPY_BRIDGE_DRAIN_MS" => "0"}
  @of_pool [:programs, :default_timeout, :budgets]
  @no_name "python stub: :name: expected that of your Bridge or Pool"

  @typedoc "The name of a stub, or its pid."
  @type stub :: atom() | pid()
  @typedoc "The id of a program, as an atom or a string, or its module (`DSPex.PythonBridge.Program`)."
  @type program :: atom() | String.t() | module()
  @type answer ::
          {:ok, outputs :: map()}
          | {:ok, outputs :: map(), meta :: map()}
          | {:error, Error.t() | DSPex.PythonBridge.Bridge.call_error()}

  ## Start

  @doc """
  Starts a stub. Options:

    * `:name` – that of the Bridge or Pool in whose place it is, an atom; required
    * `:answers` – a function of a program's id and its inputs, for the runs that no test has answered
    * `:programs` – programs that are there from the start, as for `DSPex.PythonBridge.Bridge.start_link/1`
    * `:default_timeout` – as for `DSPex.PythonBridge.Bridge.start_link/1`
    * `:budgets` – as for `DSPex.PythonBridge.Pool.start_link/1`; an answer spends what its `meta` has as `"budget"`

  A wrong option gives `{:error, %ArgumentError{}}` with a text that names it.
  """
  @spec start_link(keyword()) :: Supervisor.on_start() | {:error, Exception.t()}
  def start_link(opts) do
    answers = {:test, &is_function(&1, 2), "a function of a program's id and its inputs"}
    # The rest is checked with those of a pool.
    options = [name: :atom, answers: answers] ++ for(key <- @of_pool, do: {key, :any})

    with {:ok, opts} <- Table.check(opts, options, "python stub"),
         name when name != nil <- opts[:name],
         own = Keyword.take(opts, [:name | @of_pool]),
         # A call that a test has left under way does not delay the end of the stub.
         peer = [transport: fn -> Peer.start_link(name, opts[:answers]) end, env: @no_drain],
         {:ok, settings} <- Pool.Options.new([pool_size: 1] ++ own ++ peer, nil) do
      Pool.Supervisor.start_link(%{settings | stub?: true})
    else
      nil -> {:error, ArgumentError.exception(@no_name)}
      {:error, error} -> {:error, error}
    end
  end

  @doc "The child specification of `{Stub, opts}`; the id is the stub's name."
  @spec child_spec(keyword()) :: Supervisor.child_spec()
  def child_spec(opts) do
    %{id: opts[:name], start: {__MODULE__, :start_link, [opts]}, type: :supervisor}
  end

  ## Answers

  @doc """
  Answers the next run of a program, or the next `n`, after those that are expected already, with this function of their
  inputs. Returns the stub.
  """
  @spec expect(stub(), program(), pos_integer(), (map() -> answer())) :: stub()
  def expect(stub, program, n \\ 1, answer)
      when is_integer(n) and n > 0 and is_function(answer, 1),
      do: add(stub, program, answer, n)

  @doc """
  Answers all runs of a program that are not expected, with this function of their inputs; a second one takes its place.
  Returns the stub.
  """
  @spec stub(stub(), program(), (map() -> answer())) :: stub()
  def stub(stub, program, answer) when is_function(answer, 1),
    do: add(stub, program, answer, :always)

  defp add(stub, program, answer, times) do
    :ok = Expectations.add(find!(stub), id!(program), answer, times)
    stub
  end

  @doc """
  Lets a process use the answers of another, `owner`, until one of them ends. Returns the stub.

  Raises an `ArgumentError` if it uses those of a third one.
  """
  @spec allow(stub(), owner :: pid(), pid() | atom()) :: stub()
  def allow(stub, owner, process) when is_pid(owner) do
    name = find!(stub)

    user =
      GenServer.whereis(process) ||
        raise ArgumentError, "#{inspect(process)} is not a process that runs"

    case Expectations.allow(name, owner, user) do
      :ok -> stub
      {:error, text} -> raise ArgumentError, "stub #{inspect(name)}: #{text}"
    end
  end

  @doc """
  Raises if a run that the calling process expects of this stub has not come, or one of its answers has failed.
  """
  @spec verify!(stub()) :: :ok
  def verify!(stub), do: Expectations.verify!(self(), find!(stub))

  @doc """
  Does so for all stubs at the end of the test: `setup {DSPex.PythonBridge.Stub, :verify_on_exit!}`.
  """
  @spec verify_on_exit!(map()) :: :ok
  def verify_on_exit!(_context \\ %{}) do
    owner = self()
    Expectations.keep()

    ExUnit.Callbacks.on_exit(__MODULE__, fn ->
      try do
        Expectations.verify!(owner, :all)
      after
        Expectations.forget(owner)
      end
    end)
  end

  defp find!(stub) do
    case Pool.Handle.fetch(stub) do
      %{name: name, settings: %{stub?: true}} ->
        name

      _another ->
        raise ArgumentError,
              "#{inspect(stub)} is not a stub that runs: start_supervised!({Stub, name: …})"
    end
  end

  defp id!(program) do
    module? =
      is_atom(program) and Code.ensure_loaded?(program) and
        function_exported?(program, :definition, 0)

    id =
      if module?,
        do: Change.program_id(:create_program, program.definition()),
        else: Payload.string(program)

    id || raise ArgumentError, "expected a program's id or module, got #{inspect(program)}"
  end

  ## In an answer's function

  @doc "Sends a chunk of an output field, if the run is that of a stream. Only in the function of an answer."
  @spec chunk(field :: String.t() | atom(), text :: String.t()) :: :ok
  def chunk(field, text) when (is_binary(field) or is_atom(field)) and is_binary(text),
    do: Run.chunk(to_string(field), text)

  @doc "Sends a status, such as `\"calling tool search\"`, if the run is that of a stream. Only in the function of an answer."
  @spec status(text :: String.t()) :: :ok
  def status(text) when is_binary(text), do: Run.status(text)

  @doc """
  Calls a tool of the caller, as an agent does, and returns its result or the error that the agent's LM would be shown.
  Only in the function of an answer.
  """
  @spec call_tool(name :: String.t() | atom(), args :: map()) ::
          {:ok, term()} | {:error, String.t()}
  def call_tool(name, args \\ %{}) when (is_binary(name) or is_atom(name)) and is_map(args),
    do: Run.call_tool(to_string(name), args)
end
