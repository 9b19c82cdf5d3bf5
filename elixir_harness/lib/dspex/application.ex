defmodule DSPex.Application do
  @moduledoc """
  Starts `DSPex.PythonBridge.Supervisor` with the application. To start it in your own supervision tree instead:

      config :dspex, autostart: false
  """

  use Application

  @impl Application
  def start(_type, _args) do
    DSPex.PythonBridge.Telemetry.look()

    children =
      if Application.get_env(:dspex, :autostart, true),
        do: [DSPex.PythonBridge.Supervisor],
        else: []

    Supervisor.start_link(children, strategy: :one_for_one, name: DSPex.ApplicationSupervisor)
  end
end
