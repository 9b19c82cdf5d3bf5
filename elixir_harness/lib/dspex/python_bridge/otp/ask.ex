defmodule DSPex.PythonBridge.OTP.Ask do
  @moduledoc false
  # A question to a process that answers `{ref, answer}`, as `GenServer.call/3` but without an exit: the caller gets
  # the end of the process, or of its own time, as a value. The alias makes a late answer harmless: it ends with the first
  # answer or with demonitor, and what is sent to it afterwards goes nowhere.

  @doc "Sends the message that `message` makes of an alias, and waits for the answer, at most `timeout` ms."
  @spec ask(pid() | {atom(), node()}, timeout(), (reference() -> term())) ::
          {:ok, answer :: term()} | :down | {:timeout, reference()}
  def ask(process, timeout, message) do
    ref = :erlang.monitor(:process, process, alias: :reply_demonitor)
    send(process, message.(ref))

    receive do
      {^ref, answer} -> {:ok, answer}
      {:DOWN, ^ref, :process, _process, _reason} -> :down
    after
      timeout ->
        Process.demonitor(ref, [:flush])

        # The answer may have come between the two.
        receive do
          {^ref, answer} -> {:ok, answer}
        after
          0 -> {:timeout, ref}
        end
    end
  end
end
