defmodule DSPex.PythonBridge.Tools.Runner do
  @moduledoc false
  # The caller's functions in a call with tools, and the tool calls that the peers of the call have made: the part of
  # `DSPex.PythonBridge.Client.StreamProxy` that runs each in a process of its own (`DSPex.PythonBridge.Tools.Invocation`), which
  # is given the one function that it runs. That copies all that the function has captured, unless it is large
  # (`DSPex.PythonBridge.Tools.LargeFunction`).
  #
  # When a peer dies, the next one starts the run from the beginning. Its first call of a tool with certain arguments
  # is taken for the first such call of the peers before it, the second for the second, and so on: it gets the answer of
  # that one, or waits for it. Calls beyond these are new, and so are all of which no peer has made one like it.
  #
  # A function with `repeat: false` is given when the bridge has confirmed that it does not send the run again. Nor does a pool
  # afterwards: the run is bound.

  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Tools.{Answer, Invocation, LargeFunction}

  @enforce_keys [:tools, :run, :callers]
  defstruct [:tools, :run, :callers, :dest, :port] ++
              [users: %{}, counts: %{}, calls: %{}, claims: %{}, bound?: false]

  @typedoc """
  `dest`, `port`: the bridge, and the peer that has called last. `users`: the processes of tools that have not answered.
  `counts`: how many calls that peer has made, by their digest. `claims`: who gets a function when the bridge has confirmed.
  `bound?`: whether the run must not be sent to another peer.
  """
  @type t :: %__MODULE__{
          tools: tools(),
          run: run(),
          callers: [pid()],
          dest: Invocation.bridge() | nil,
          port: Invocation.peer() | nil,
          users: %{pid() => Invocation.t()},
          counts: %{binary() => pos_integer()},
          calls: %{
            call() => {:running, pid(), waiting :: [reference()]} | {:answered, Answer.t()}
          },
          claims: %{reference() => {pid(), reference(), function(), call()}},
          bound?: boolean()
        }
  @type tools :: %{String.t() => tool()}
  @typedoc "A function, and whether a call of it may be made again."
  @type tool ::
          {function :: (map() -> term()) | (map(), String.t() -> term()), repeat? :: boolean()}
  @typedoc "The whole call: an id that no other one has, and what its events have."
  @type run :: {id :: binary(), about()}
  @type about :: %{pool: term(), program_id: String.t() | nil, telemetry_metadata: map()}
  @typedoc "A call of a run, whichever peers make it. `digest`: of the tool's name and its arguments."
  @type call :: {digest :: binary(), nth :: pos_integer()}

  @doc """
  Functions by the names that the peer uses, each with whether a call of it may be made again, or the error message that
  refuses them.

      iex> refund = {&List.wrap/1, repeat: false}
      iex> DSPex.PythonBridge.Tools.Runner.functions(%{:search => &List.wrap/1, "refund" => refund})
      {:ok, %{"search" => {&List.wrap/1, true}, "refund" => {&List.wrap/1, false}}}
      iex> DSPex.PythonBridge.Tools.Runner.functions(%{search: {&List.wrap/1, repeats: false}})
      {:error, "search: unknown option :repeats, did you mean :repeat?"}
  """
  @spec functions(term()) :: {:ok, tools()} | {:error, String.t()}
  def functions(tools) when is_map(tools) and not is_struct(tools) do
    Enum.reduce_while(tools, {:ok, %{}}, fn {name, tool}, {:ok, named} ->
      with {:ok, text} <- name(name),
           {:ok, tool} <- tool(text, tool),
           false <- is_map_key(named, text) do
        {:cont, {:ok, Map.put(named, text, tool)}}
      else
        true -> {:halt, {:error, "#{name}: there twice, as atom and as string"}}
        {:error, text} -> {:halt, {:error, text}}
      end
    end)
  end

  def functions(_other), do: {:error, "expected a map of names to functions"}

  defp name(name) do
    text = Payload.string(name)

    if text != nil and String.valid?(text),
      do: {:ok, text},
      else: {:error, "expected names that are atoms or strings"}
  end

  defp tool(name, {function, opts}) when is_function(function, 1) or is_function(function, 2) do
    case Table.check(opts, repeat: {:boolean, true}, approve: &unapproved/1) do
      {:ok, opts} -> {:ok, {function, opts[:repeat]}}
      {:error, text} -> {:error, "#{name}: #{text}"}
    end
  end

  defp tool(_name, function) when is_function(function, 1) or is_function(function, 2),
    do: {:ok, {function, true}}

  defp tool(name, _other) do
    expected = "a function of one argument, or of two, or {function, repeat: false}"
    {:error, "#{name}: expected #{expected}"}
  end

  defp unapproved(false), do: :ok

  defp unapproved(_true),
    do: {:error, "only a run of DSPex.PythonBridge.Durable can wait for an approval"}

  @doc "The functions of a call, whose process calls this. `callers`: as for `Task`, the caller first."
  @spec new(tools(), about(), [pid()], id :: binary()) :: t()
  def new(tools, about, callers, id) do
    {tools, _erases_when_this_ends} = LargeFunction.hold(tools, self())
    %__MODULE__{tools: tools, run: {id, about}, callers: callers}
  end

  @doc "Runs a tool call. The process of the call gets `{:answered, pid, call, answer}`, and `:DOWN` when it has ended."
  @spec run(t(), Invocation.t()) :: t()
  def run(%__MODULE__{port: port} = runner, %Invocation{port: port} = invocation) do
    args = [invocation, self(), runner.dest, runner.callers]
    {pid, _monitor} = spawn_monitor(Invocation, :run, args)
    put_in(runner.users[pid], invocation)
  end

  # Another peer. The tools of the one before go on: this one may make the same calls. Nobody needs what these wait for.
  def run(%__MODULE__{} = runner, invocation) do
    waiting = for {_call, {:running, _pid, refs}} <- runner.calls, ref <- refs, do: ref
    claimed = for {_claim, {_pid, ref, _function, _call}} <- runner.claims, do: ref
    for ref <- waiting ++ claimed, do: reply(ref, :over)

    calls =
      Map.new(runner.calls, fn
        {call, {:running, pid, _waiting}} -> {call, {:running, pid, []}}
        answered -> answered
      end)

    run(%{runner | port: invocation.port, counts: %{}, calls: calls, claims: %{}}, invocation)
  end

  @doc """
  Answers what a process is to do with its tool call, now or when the like call of an earlier peer has ended: run a function, give
  the answer of an earlier peer's call, or nothing, since there is no such function, or the call is over.
  """
  @spec fetch(t(), pid(), reference(), String.t(), digest :: binary()) :: t()
  def fetch(%__MODULE__{port: port, tools: tools} = runner, pid, ref, name, digest) do
    case runner.users do
      %{^pid => %Invocation{port: ^port, id: id}} when is_map_key(tools, name) ->
        nth = Map.get(runner.counts, digest, 0) + 1
        give(put_in(runner.counts[digest], nth), {pid, ref, id}, tools[name], {digest, nth})

      %{^pid => %Invocation{port: ^port}} ->
        reply(ref, {:unknown, tools |> Map.keys() |> Enum.sort(), runner.run})
        runner

      _of_an_earlier_peer ->
        reply(ref, :over)
        runner
    end
  end

  defp give(%__MODULE__{} = runner, {pid, ref, id}, {function, repeat?}, call) do
    case runner.calls do
      %{^call => {:answered, answer}} ->
        reply(ref, {:answered, answer, runner.run})
        runner

      %{^call => {:running, maker, waiting}} ->
        put_in(runner.calls[call], {:running, maker, [ref | waiting]})

      _new when repeat? ->
        start(runner, {pid, ref, function, call})

      # Once the bridge knows, the death of the peer ends the run. If the peer is gone by then, the function must not be called
      # for it.
      _new ->
        claim = :erlang.alias([:reply])
        send(runner.dest, {:bind, runner.port, id, claim})
        put_in(runner.claims[claim], {pid, ref, function, call})
    end
  end

  defp start(runner, {pid, ref, function, call}) do
    reply(ref, {:run, function, call, runner.run})
    put_in(runner.calls[call], {:running, pid, []})
  end

  defp reply(ref, answer), do: send(ref, {ref, answer})

  @doc "Takes the bridge's answer to a claim: whether the function may begin."
  @spec confirmed(t(), reference(), :ok | :over) :: t()
  def confirmed(%__MODULE__{} = runner, claim, answer) do
    {{_pid, ref, _function, _call} = claimed, claims} = Map.pop!(runner.claims, claim)
    runner = %{runner | claims: claims}

    if answer == :ok do
      start(%{runner | bound?: true}, claimed)
    else
      reply(ref, :over)
      runner
    end
  end

  @doc "Takes the answer of a process, for its peer, those that wait for it and later peers. Only this process sends it: it is one."
  @spec answered(t(), pid(), call() | nil, Answer.t() | :unreadable_frame) :: t()
  def answered(%__MODULE__{} = runner, pid, call, answer) do
    {%Invocation{port: port, id: id}, users} = Map.pop!(runner.users, pid)

    if port == runner.port do
      result = with %Answer{frame: frame} <- answer, do: {:tool_result, port, id, frame}
      send(runner.dest, result)
    end

    keep(%{runner | users: users}, pid, call, answer)
  end

  defp keep(runner, pid, call, answer) do
    case runner.calls do
      %{^call => {:running, ^pid, waiting}} ->
        for ref <- waiting, do: reply(ref, {:answered, answer, runner.run})
        put_in(runner.calls[call], {:answered, answer})

      _none ->
        runner
    end
  end

  @doc "Handles the end of a process. If it was killed, for example, and has given no answer, that is an error."
  @spec ended(t(), pid(), reason :: term()) :: t()
  def ended(%__MODULE__{users: users} = runner, pid, reason) when is_map_key(users, pid) do
    call = Enum.find_value(runner.calls, &with({call, {:running, ^pid, _}} <- &1, do: call))
    answered(runner, pid, call, Invocation.failed(users[pid], reason))
  end

  def ended(%__MODULE__{} = runner, _pid, _reason), do: runner

  @doc "Ends all of them. A function may trap exits."
  @spec stop(t()) :: :ok
  def stop(%__MODULE__{users: users}),
    do: Enum.each(users, fn {pid, _invocation} -> Process.exit(pid, :kill) end)
end
