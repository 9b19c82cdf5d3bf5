# Only for work on the harness itself: a project that has :dspex as a dependency reads its own
# configuration, never this file.
import Config

if config_env() == :test do
  # Each test starts the bridges it needs.
  config :dspex, autostart: false
  # Supervisors' reports are looked at, too: no secret may show in them.
  config :logger, level: :warning, handle_sasl_reports: true
end
