defmodule Mix.DSPex.Interrupt do
  @moduledoc false
  # Ctrl-C as a message to a task, which then ends in order.
  #
  # The BEAM does not let code handle Ctrl-C (SIGINT): it stops everything and shows its break menu. So the terminal is told
  # to send SIGQUIT for Ctrl-C, for which a handler can be set. Without a terminal, or `stty`, Ctrl-C stays what it is.
  # SIGTERM comes as the same message.

  @behaviour :gen_event

  @signals [:sigquit, :sigterm]
  @handler :erl_signal_handler

  @doc "Calls `fun`; meanwhile this process gets `:interrupted`, once. A second Ctrl-C is the BEAM's."
  @spec during((-> value)) :: value when value: term()
  def during(fun) do
    restore = terminal()
    state = {self(), restore}
    :ok = :gen_event.swap_handler(:erl_signal_server, {@handler, []}, {__MODULE__, state})

    try do
      fun.()
    after
      :gen_event.swap_handler(:erl_signal_server, {__MODULE__, []}, {@handler, []})
      restore.()
    end
  end

  # The function that undoes it.
  defp terminal do
    with {words, 0} <- System.cmd("ps", ["-o", "tty=", "-p", System.pid()]),
         path = "/dev/" <> String.trim(words),
         {saved, 0} <- stty(path, "-g"),
         {_nothing, 0} <- stty(path, "intr undef quit ^C") do
      fn -> stty(path, String.trim(saved)) end
    else
      _no_terminal -> fn -> :ok end
    end
  rescue
    # There is no such program.
    ErlangError -> fn -> :ok end
  end

  defp stty(path, words),
    do: System.cmd("sh", ["-c", ~s(exec stty $1 < "$0"), path, words], stderr_to_stdout: true)

  @impl :gen_event
  def init({state, _of_the_other}) do
    {:ok, others} = :erl_signal_handler.init([])
    {:ok, {state, others}}
  end

  @impl :gen_event
  def handle_event(signal, {{task, restore}, others}) when signal in @signals do
    send(task, :interrupted)
    # Not in the process of the signals.
    spawn(restore)
    {:ok, {:interrupted, others}}
  end

  # The second one, and other signals.
  def handle_event(signal, {state, others}) do
    {:ok, others} = :erl_signal_handler.handle_event(signal, others)
    {:ok, {state, others}}
  end

  @impl :gen_event
  def handle_call(_question, state), do: {:ok, :ok, state}
end
