defmodule DSPex.PythonBridge.Pool.Route do
  @moduledoc false
  # The way of one call, in the caller's process. `next/1` gives the bridge that it is sent to: the least busy one of this
  # node whose peer is up; if there is none, that of another node of the cluster; if there is none either, it waits until
  # that changes. `follow/2` says what a reply means: the result, or that the call is resent, by `next/1` again.
  #
  # A request that took a peer down may take the next one down, too: after `max_retries` more deaths it fails. From the
  # second death on, or with one retry left, it stays with the bridge whose peer died of it last, which resends it to its next peer, and finds out
  # which of such requests kills (`DSPex.PythonBridge.Calls.Suspects`): so one request never has more than two peers down.

  alias DSPex.PythonBridge.{Calls, Client, Error, Programs, Telemetry}
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Pool.{Budgets, Coordinator, Handle, LoadCounters}
  alias DSPex.PythonBridge.Telemetry.Metadata

  # For each call.
  @compile {:inline, send_to: 3, passed: 2, stays?: 1}

  # A node that has not answered by then hangs or cannot be reached: the runtime itself takes a minute to notice.
  @reach_ms 2_000
  # A peer may have begun a call that ends like this.
  @begun [{:died, :sent}, {:died, :spared}, :python_process_died, :replaced, :bridge_not_running]

  @enforce_keys [:handle, :body, :deadline]
  defstruct [:handle, :body, :deadline, :change, :journal, :program, :bridge, :at, :overloaded] ++
              [
                counted: nil,
                deaths: 0,
                spared: 0,
                passed: [],
                passed_nodes: [],
                stream?: false,
                resend?: true,
                reach: :all
              ]

  @typedoc """
  `program`: the id of the program of an `execute_program`. `bridge`, `at`: where it was sent last; `:here`, or the
  coordinator of another node, and the readiness of the slot. `passed`: places that could not serve it, since they
  became ready; `passed_nodes`: rows of the table of other nodes that could not. `overloaded`: the error of a peer or
  bridge that was. `deaths`, `spared`: as in `t:DSPex.PythonBridge.Calls.Request.t/0`. `resend?`: whether it may be
  resent after a peer has died with it. `reach`: with `:any`, peers of this node come first no more than those of
  others.
  """
  @type t :: %__MODULE__{
          handle: Handle.t(),
          body: binary(),
          deadline: Deadline.t(),
          change: Programs.Store.change() | nil,
          journal: Calls.Journal.t() | nil,
          program: Programs.Store.id() | nil,
          bridge: pid() | nil,
          at: place() | nil,
          overloaded: Error.t() | nil,
          counted: Budgets.run() | nil,
          deaths: non_neg_integer(),
          spared: non_neg_integer(),
          passed: [place()],
          passed_nodes: [tuple()],
          stream?: boolean(),
          resend?: boolean(),
          reach: :all | :any
        }
  @type place :: {:here | pid(), LoadCounters.index(), since :: non_neg_integer()}

  @doc "Makes a call without chunks and tools."
  @spec run(t()) :: Client.Caller.result()
  def run(route) do
    with {:send, request, route} <- next(route) do
      left = Deadline.left(route.deadline)

      case follow(route, Client.Caller.send_and_wait(route.bridge, left, request)) do
        {:resend, route} -> run(route)
        {:done, result} -> result
      end
    end
  end

  ## The next bridge

  @doc "The request for the next bridge, `route.bridge`."
  @spec next(t()) :: {:send, Calls.Request.t(), t()} | {:error, Error.t()}
  def next(%__MODULE__{reach: :any} = route) do
    others = others(route.handle)
    route = %{route | reach: :all}

    # Each node has the same chance.
    if :rand.uniform(length(others) + 1) > 1,
      do: ask_node(route, Enum.random(others)),
      else: next(route)
  end

  def next(%__MODULE__{handle: %Handle{counters: counters} = handle} = route) do
    case not stays?(route) && LoadCounters.pick(counters, passed(route, :here)) do
      false ->
        send_to(route, route.bridge, route.at)

      nil ->
        elsewhere(route)

      index ->
        at = {:here, index, LoadCounters.ready_since(counters, index)}

        case Process.whereis(Handle.bridge(handle, index)) do
          nil ->
            next(%{route | passed: [at | route.passed]})

          bridge ->
            LoadCounters.sending(counters, index)
            send_to(route, bridge, at)
        end
    end
  end

  defp stays?(%__MODULE__{deaths: 0}), do: false

  defp stays?(%__MODULE__{deaths: deaths, bridge: bridge, handle: handle}),
    do: deaths >= min(2, handle.settings.max_retries) and bridge != nil

  defp passed(%__MODULE__{passed: []}, :here), do: []

  defp passed(%__MODULE__{handle: handle} = route, :here),
    do: LoadCounters.still(handle.counters, passed_at(route, :here))

  defp passed_at(route, where),
    do: for({^where, index, since} <- route.passed, do: {index, since})

  defp send_to(%__MODULE__{} = route, bridge, at) do
    route = %{route | bridge: bridge, at: at}

    request = %Calls.Request{
      body: route.body,
      change: route.change,
      journal: route.journal,
      resend: if(stays?(route), do: :bridge, else: :caller),
      deaths: route.deaths,
      spared: route.spared,
      stream?: route.stream?
    }

    {:send, request, route}
  end

  defp elsewhere(%__MODULE__{handle: handle} = route) do
    case others(handle) -- route.passed_nodes do
      [] -> nobody(route)
      others -> ask_node(route, Enum.random(others))
    end
  end

  # The table is the pool's, which may end at any time.
  defp others(%Handle{settings: %{cluster: nil}}), do: []

  defp others(handle) do
    :ets.tab2list(handle.others)
  rescue
    ArgumentError -> []
  end

  defp ask_node(route, {coordinator, _since} = other) do
    passed = passed_at(route, coordinator)
    wait_ms = min(Deadline.left(route.deadline), @reach_ms)

    case Coordinator.pick_there(coordinator, passed, wait_ms) do
      {:ok, bridge, {index, since}} -> send_to(route, bridge, {coordinator, index, since})
      nil -> next(%{route | passed_nodes: [other | route.passed_nodes]})
    end
  end

  defp nobody(%__MODULE__{overloaded: %Error{} = error}), do: {:error, error}

  defp nobody(%__MODULE__{handle: %Handle{name: name}} = route) do
    case Coordinator.wait(name, route.deadline, passed_at(route, :here), route.passed_nodes) do
      {:not_started, reason} -> {:error, Error.not_started(reason)}
      :timeout -> {:error, Error.new(:timeout)}
      _changed_or_restarted -> again(name, %{route | passed: [], passed_nodes: []})
    end
  end

  # The pool may have been restarted meanwhile, with other slots.
  defp again(name, route) do
    case Handle.fetch(name) do
      nil -> {:error, Error.not_running(:pool, name)}
      handle -> next(%{route | handle: handle})
    end
  end

  ## What a reply means

  @doc """
  What follows from the reply of `route.bridge`. The call is resent if the bridge or its peer has not got it, has ended, or
  was too busy; with `resend?: false`, not if a peer may have begun it.
  """
  @spec follow(t(), Calls.Request.reply()) :: {:resend, t()} | {:done, Client.Caller.result()}
  def follow(%__MODULE__{} = route, reply) do
    cond do
      not stays?(route) -> go_on(route, reply)
      reply == {:error, :bridge_not_running} -> {:resend, pass(%{route | bridge: nil})}
      true -> {:done, Client.Caller.read(reply)}
    end
  end

  defp go_on(%__MODULE__{} = route, {:frame, _bytes} = reply) do
    case Client.Caller.read(reply) do
      # A peer that has asked LMs or tools before would ask them again: it is not retryable then.
      {:error, %Error{type: :overloaded, retryable: true} = error} ->
        {:resend, pass(%{route | overloaded: error})}

      {:error, %Error{type: :program_not_found} = error} ->
        not_found(route, error)

      result ->
        {:done, result}
    end
  end

  defp go_on(%__MODULE__{resend?: false}, {:error, gone}) when gone in @begun do
    gone = if gone == :bridge_not_running, do: :python_process_died, else: gone
    {:done, Client.Caller.read({:error, gone})}
  end

  defp go_on(%__MODULE__{} = route, {:error, died})
       when died in [{:died, :sent}, :python_process_died],
       do: resend_after_death(route)

  defp go_on(%__MODULE__{spared: spared} = route, {:error, {:died, :spared}}),
    do: {:resend, pass(%{route | spared: spared + 1})}

  defp go_on(%__MODULE__{} = route, {:error, gone})
       when gone in [{:died, :unsent}, :replaced, :bridge_not_running],
       do: {:resend, pass(route)}

  # What a peer says of it tells more.
  defp go_on(%__MODULE__{} = route, {:error, :overloaded}) do
    error = route.overloaded || Error.new(:overloaded)
    {:resend, pass(%{route | overloaded: error})}
  end

  # Its time has passed, or it is too large.
  defp go_on(_route, reply), do: {:done, Client.Caller.read(reply)}

  defp resend_after_death(%__MODULE__{handle: handle, deaths: deaths} = route) do
    if deaths < handle.settings.max_retries do
      bridge = Metadata.name(route.bridge)
      metadata = %{bridge: bridge, pool: handle.name, reason: :died}
      Telemetry.execute([:bridge, :resend], %{count: 1}, metadata)
      {:resend, pass(%{route | deaths: deaths + 1})}
    else
      {:done, {:error, Error.new(:python_process_died)}}
    end
  end

  defp pass(%__MODULE__{at: at, passed: passed} = route), do: %{route | passed: [at | passed]}

  # Another node may not have what is declared here.
  defp not_found(%__MODULE__{at: {coordinator, _, _}, handle: handle} = route, error)
       when coordinator != :here and route.program != nil do
    if Programs.Store.get(handle.programs, route.program) do
      nodes = :ets.lookup(handle.others, coordinator) ++ route.passed_nodes
      {:resend, %{pass(route) | passed_nodes: nodes}}
    else
      {:done, {:error, error}}
    end
  rescue
    # The tables have ended with the pool.
    ArgumentError -> {:done, {:error, error}}
  end

  defp not_found(%__MODULE__{handle: handle, program: program}, error) do
    {:done, {:error, Programs.Store.undeclared(handle.programs)[program] || error}}
  rescue
    ArgumentError -> {:done, {:error, error}}
  end
end
