defmodule DSPex.Test.Telemetry do
  @moduledoc """
  An application that has `:telemetry`, for as long as a test needs it: the stand-in of telemetry.exs. For tests
  that run alone.
  """

  @compile {:no_warn_undefined, :telemetry}

  alias DSPex.PythonBridge.Telemetry

  @source Path.join(__DIR__, "telemetry.exs")

  @events [
    [:bridge, :call, :start],
    [:bridge, :call, :stop],
    [:bridge, :call, :exception],
    [:bridge, :peer, :up],
    [:bridge, :peer, :down],
    [:bridge, :resend],
    [:monitor, :check],
    [:pool, :call, :start],
    [:pool, :call, :stop],
    [:pool, :call, :exception],
    [:pool, :checkout],
    [:lm, :stop],
    [:durable, :suspended],
    [:durable, :resumed],
    [:durable, :diverged],
    [:tool, :start],
    [:tool, :stop],
    [:tool, :exception],
    [:evaluate, :start],
    [:evaluate, :progress],
    [:evaluate, :stop],
    [:evaluate, :exception]
  ]

  @doc "The application has it from now on."
  def install do
    {:module, :telemetry} = :code.load_binary(:telemetry, ~c"telemetry.exs", code())
    true = Telemetry.look()
    :ok
  end

  # Compiled once: that takes longer than most tests that ask for it.
  defp code do
    with nil <- :persistent_term.get(__MODULE__, nil) do
      [{:telemetry, code}] = Code.compile_file(@source)
      :persistent_term.put(__MODULE__, code)
      code
    end
  end

  @doc "The application no longer has it."
  def remove do
    take_away()
    false = Telemetry.look()
    :ok
  end

  @doc "The module is gone, without a notification."
  def take_away do
    :persistent_term.erase({:telemetry, :handlers})
    :code.purge(:telemetry)
    :code.delete(:telemetry)
    :code.purge(:telemetry)
    :ok
  end

  @doc "Has the calling process sent each event, or these, without their prefix: `{event, measurements, metadata}`."
  def attach(events \\ @events) do
    owner = self()
    events = for event <- events, do: [:dspex | event]

    :ok =
      :telemetry.attach_many(
        owner,
        events,
        fn [:dspex | event], measured, metadata, nil ->
          send(owner, {event, measured, metadata})
        end,
        nil
      )

    ExUnit.Callbacks.on_exit(fn -> :telemetry.detach(owner) end)
  end

  @doc "What has been sent so far."
  def events do
    receive do
      {[_ | _] = event, measured, metadata} -> [{event, measured, metadata} | events()]
    after
      0 -> []
    end
  end
end
