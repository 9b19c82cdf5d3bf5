defmodule Sim.Instrument do
  @moduledoc """
  Loads the modules under test under other names, with their calls to the runtime replaced.

  The code is that of the release, from its compiled form: `send`, monitors, timers, clocks, names, `receive` and `:pg` go to
  `Sim.Runtime`, nothing else changes. So production code has no seam for the simulation, and pays nothing for it.
  """

  @modules ~w(
    Pool.Caller Pool.Route Pool.Handle Pool.Coordinator Pool.Cluster
    Programs.Store Programs.Declared Client.Caller OTP.Ask OTP.Deadline OTP.Registry OTP.ServerGuard Pool.LoadCounters
  )

  @replaced %{
    erlang: [
      node: 0,
      node: 1,
      send: 2,
      send: 3,
      monitor: 2,
      monitor: 3,
      demonitor: 1,
      demonitor: 2,
      alias: 1,
      unalias: 1,
      spawn: 1,
      exit: 2,
      process_flag: 2,
      start_timer: 3,
      send_after: 3,
      cancel_timer: 2,
      unique_integer: 1,
      monotonic_time: 0,
      monotonic_time: 1,
      is_process_alive: 1
    ],
    pg: [start: 1, monitor: 2, join: 3, get_members: 2],
    persistent_term: [get: 2, put: 2, erase: 1],
    "Elixir.Process": [whereis: 1, sleep: 1],
    "Elixir.System": [monotonic_time: 1, system_time: 1],
    "Elixir.Enum": [random: 1]
  }

  # Compiling takes most of the time of a short run: the passes that only make code faster are left out.
  @compiler [:deterministic, :return_errors] ++
              ~w(no_copt no_bool_opt no_share_opt no_bsm_opt no_fun_opt no_type_opt no_ssa_opt no_postopt no_recv_opt)a

  @doc "The names of the modules under test, without `DSPex.PythonBridge`."
  def modules, do: @modules

  @doc "Loads all modules below `prefix`; `mutation`: `{module, source text, its replacement}` or nil."
  def load(prefix, mutation \\ nil) do
    for name <- @modules do
      original = Module.concat(DSPex.PythonBridge, name)
      {forms, as} = forms(original, name, mutation)
      names = for name <- @modules, into: %{}, do: {Module.concat(DSPex.PythonBridge, name), Module.concat(prefix, name)}
      names = Map.put(names, as, Module.concat(prefix, name))
      forms = for form <- forms, keep?(form), do: form |> rewrite() |> rename(names)
      {:ok, module, binary} = :compile.forms(forms, @compiler)
      {:module, ^module} = :code.load_binary(module, ~c"sim", binary)
    end

    prefix
  end

  defp forms(original, name, {name, text, replacement}) do
    source = File.read!(original.module_info(:compile)[:source])
    as = Module.concat([SimMutant, "N#{System.unique_integer([:positive])}", name])
    [before, rest] = String.split(source, text)
    source = String.replace(before <> replacement <> rest, "defmodule #{inspect(original)} do", "defmodule #{inspect(as)} do")
    # ExUnit compiles its files without.
    Code.put_compiler_option(:debug_info, true)
    {[{^as, binary}], _warnings} = Code.with_diagnostics(fn -> Code.compile_string(source, "mutant.ex") end)
    {debug_forms(as, binary), as}
  end

  defp forms(original, _name, _mutation) do
    {^original, binary, _file} = :code.get_object_code(original)
    {debug_forms(original, binary), original}
  end

  defp debug_forms(module, binary) do
    {:ok, {_, [debug_info: {:debug_info_v1, backend, data}]}} = :beam_lib.chunks(binary, [:debug_info])
    {:ok, forms} = backend.debug_info(:erlang_v1, module, data, [])
    forms
  end

  # Types name what is not there under other names.
  defp keep?({:attribute, _, kind, _}), do: kind not in [:spec, :type, :opaque, :export_type, :callback, :dialyzer]
  defp keep?(_form), do: true

  ## Calls of the runtime

  defp rewrite({:call, at, {:remote, _, {:atom, _, module}, {:atom, _, name}} = function, args}) do
    args = rewrite(args)
    if replaced?(module, name, length(args)), do: call(at, name(module, name), args), else: {:call, at, function, args}
  end

  defp rewrite({:fun, at, {:function, {:atom, _, module}, {:atom, _, name}, {:integer, _, arity}}} = fun) do
    if replaced?(module, name, arity),
      do: {:fun, at, {:function, {:atom, at, Sim.Runtime}, {:atom, at, name(module, name)}, {:integer, at, arity}}},
      else: fun
  end

  # Guards and patterns stay as they are.
  defp rewrite({:clause, at, patterns, guards, body}), do: {:clause, at, patterns, guards, rewrite(body)}
  defp rewrite({:receive, at, clauses}), do: waiting(at, rewrite(clauses), {:atom, at, :infinity}, [{:atom, at, :never}])
  defp rewrite({:receive, at, clauses, {:integer, _, 0} = zero, late}), do: {:receive, at, rewrite(clauses), zero, rewrite(late)}
  defp rewrite({:receive, at, clauses, timeout, late}), do: waiting(at, rewrite(clauses), rewrite(timeout), rewrite(late))
  defp rewrite(form) when is_tuple(form), do: form |> Tuple.to_list() |> rewrite() |> List.to_tuple()
  defp rewrite([head | tail]), do: [rewrite(head) | rewrite(tail)]
  defp rewrite(other), do: other

  defp replaced?(module, name, arity), do: {name, arity} in Map.get(@replaced, module, [])

  defp name(module, name) when module in [:pg, :persistent_term], do: :"#{module}_#{name}"
  defp name(_module, name), do: name

  defp call(at, name, args), do: {:call, at, {:remote, at, {:atom, at, Sim.Runtime}, {:atom, at, name}}, args}

  # What is in the mailbox now, or a wait in simulated time, and again.
  defp waiting(at, clauses, timeout, late) do
    unique = System.unique_integer([:positive])
    deadline = {:var, at, :"Deadline@sim#{unique}"}
    again = {:var, at, :"Again@sim#{unique}"}

    wait =
      {:case, at, call(at, :wait, [deadline]),
       [
         {:clause, at, [{:atom, at, :again}], [], [{:call, at, again, []}]},
         {:clause, at, [{:atom, at, :timeout}], [], late}
       ]}

    loop = {:named_fun, at, elem(again, 2), [{:clause, at, [], [], [{:receive, at, clauses, {:integer, at, 0}, [wait]}]}]}
    {:block, at, [{:match, at, deadline, call(at, :deadline, [timeout])}, {:call, at, loop, []}]}
  end

  ## Names

  defp rename({:atom, at, name}, names), do: {:atom, at, Map.get(names, name, name)}
  defp rename({:attribute, at, :module, name}, names), do: {:attribute, at, :module, Map.get(names, name, name)}
  defp rename(form, names) when is_tuple(form), do: form |> Tuple.to_list() |> rename(names) |> List.to_tuple()
  defp rename([head | tail], names), do: [rename(head, names) | rename(tail, names)]
  defp rename(other, _names), do: other
end
