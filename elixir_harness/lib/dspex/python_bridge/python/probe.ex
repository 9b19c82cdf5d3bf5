defmodule DSPex.PythonBridge.Python.Probe do
  @moduledoc false
  # What an interpreter reports about itself, in one run that imports nothing heavy: its version, the installed
  # distributions, the folder of the peer's package.

  alias DSPex.PythonBridge.OS

  @min_python "3.10"
  # Tens of milliseconds, on a cold disk a few seconds.
  @time_limit_ms 15_000

  # It must be valid for old Python versions, too. Modules in the working directory do not count. The package dspy_bridge is
  # searched for where the peer's script does.
  @script """
  import sys
  sys.path[:] = [p for p in sys.path if p]
  answer = {"version": ".".join(str(n) for n in sys.version_info[:3]), "found": {}, "bridge": True}
  if sys.version_info >= (3, 8):
      import os
      from importlib import metadata, util
      for name in sys.argv[2:]:
          try:
              answer["found"][name] = metadata.version(name)
          except Exception:
              pass
      answer["venv"] = sys.prefix != sys.base_prefix
      here = os.path.dirname(os.path.realpath(sys.argv[1]))
      checkout = os.path.dirname(os.path.dirname(os.path.dirname(here)))
      for folder in (checkout, os.path.join(here, "package")):
          if os.path.isfile(os.path.join(folder, "dspy_bridge", "__main__.py")):
              answer["bridge"] = folder
              break
      else:
          sys.path[:] = [p for p in sys.path if os.path.realpath(p) != here]
          spec = util.find_spec("dspy_bridge")
          origin = spec and spec.origin
          answer["bridge"] = os.path.dirname(os.path.dirname(origin)) if origin else bool(spec)
  import json
  print("\\nDSPEX " + json.dumps(answer))
  """

  @enforce_keys [:python, :version]
  defstruct [:python, :version, venv?: false, found: %{}, bridge: true]

  @typedoc """
  `found`: the versions of the distributions that are installed; `bridge`: the folder of the package `dspy_bridge`, false
  if there is none; `venv?`: whether it is that of a virtual environment.
  """
  @type t :: %__MODULE__{
          python: Path.t(),
          version: String.t(),
          venv?: boolean(),
          found: %{String.t() => String.t()},
          bridge: String.t() | boolean()
        }

  @doc """
  Probes the interpreter `python` for `distributions`, and for the package of the peer's script; takes at most 15 s.
  `env` is more environment, as a port takes it.
  """
  @spec run(Path.t(), Path.t(), [String.t()], [{charlist(), charlist()}]) ::
          {:ok, t()} | {:error, String.t()}
  def run(python, script_path, distributions, env \\ []) do
    args = ["-c", @script, script_path | distributions]

    case OS.Command.run(python, args, env: env, limit_ms: @time_limit_ms) do
      {:exit, 0, output} -> read(output, python)
      {:exit, status, output} -> cannot(python, "exit status #{status}#{last_line(output)}")
      {:error, why} -> cannot(python, why)
    end
  end

  @doc "The error of an interpreter that is too old for the peer; nil if it is not."
  @spec too_old(t()) :: String.t() | nil
  def too_old(%__MODULE__{python: python, version: version}) do
    if Version.compare(version, @min_python <> ".0") == :lt,
      do: "Python too old: #{python} is #{version}, needed is #{@min_python}"
  end

  @doc "The oldest version that works."
  @spec min_python() :: String.t()
  def min_python, do: @min_python

  defp read(output, python) do
    case answer(output) do
      %{"version" => version, "found" => found} = all ->
        bridge = Map.get(all, "bridge", true)
        probe = %__MODULE__{python: python, version: version, found: found, bridge: bridge}
        {:ok, %{probe | venv?: all["venv"] == true}}

      _other ->
        cannot(python, "it is not a Python#{last_line(output)}")
    end
  end

  @doc """
  The JSON object in the first line that starts with `DSPEX `; nil if there is none. Other lines may be warnings.

      iex> DSPex.PythonBridge.Python.Probe.answer("hello\\nDSPEX {\\"version\\": \\"3.11.0\\"}\\n")
      %{"version" => "3.11.0"}
  """
  @spec answer(String.t()) :: map() | nil
  def answer(output) do
    with [json | _rest] <- for("DSPEX {" <> rest <- String.split(output, "\n"), do: "{" <> rest),
         {:ok, object} <- JSON.decode(String.trim(json)),
         do: object,
         else: (_none -> nil)
  end

  defp cannot(python, why), do: {:error, "#{python} cannot be run: #{why}"}

  defp last_line(output), do: if(line = OS.Command.last_line(output), do: ": " <> line, else: "")
end
