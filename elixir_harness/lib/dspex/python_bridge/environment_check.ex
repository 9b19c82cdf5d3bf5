defmodule DSPex.PythonBridge.EnvironmentCheck do
  @moduledoc """
  Whether this machine has what the bridge needs, told before the first call fails:
  the configuration, the interpreter, its version, the installed packages, the peer's script.

  `config :dspex, :python_environment`:

    * `:virtual_env` – the folder of a virtual environment
    * `:required_packages` – distribution names, as `pip` has them (default `["dspy", "psutil"]`)
  """

  alias DSPex.PythonBridge.{Interpreter, Monitor, Options, OsProcess}

  @min_python {3, 10}
  @default_packages ["dspy", "psutil"]
  # What makes a script the bridge's own.
  @script_texts ["class DSPyBridge", "def handle_command", "def main():"]
  # It imports nothing heavy: tens of milliseconds, on a cold disk a few seconds.
  @time_limit_ms 15_000
  @max_output_bytes 65_536

  # Runs on any Python that can be found, so it must be valid for old ones, too. The folder it is
  # started in is no place to find modules. The package dspy_bridge is looked for where the drop-in
  # script looks.
  @probe """
  import sys
  sys.path[:] = [p for p in sys.path if p]
  version = ".".join(str(n) for n in sys.version_info[:3])
  found = {}
  bridge = True
  if sys.version_info >= (3, 8):
      import os
      from importlib import metadata, util
      for name in sys.argv[2:]:
          try:
              found[name] = metadata.version(name)
          except Exception:
              pass
      here = os.path.dirname(os.path.realpath(sys.argv[1]))
      checkout = os.path.dirname(os.path.dirname(os.path.dirname(here)))
      if not os.path.isfile(os.path.join(checkout, "dspy_bridge", "__main__.py")):
          sys.path[:] = [p for p in sys.path if os.path.realpath(p) != here]
          bridge = util.find_spec("dspy_bridge") is not None
  import json
  print("\\nDSPEX " + json.dumps({"version": version, "found": found, "bridge": bridge}))
  """

  @type report :: %{
          python_path: Path.t(),
          script_path: Path.t(),
          python_version: String.t(),
          dspy_version: String.t() | nil,
          packages: %{String.t() => String.t()}
        }

  @doc """
  Checks everything with one launch of the interpreter (at most 15 s; usually 50 ms).

  `packages` of the result maps each required package to its version. The error is a text that
  says what is wrong and what was expected.
  """
  @spec validate_environment() :: {:ok, report()} | {:error, String.t()}
  def validate_environment do
    with {:ok, required} <- configuration(),
         {:ok, options} <- bridge_options(),
         {:ok, _monitor} <- monitor_options(),
         {:ok, python} <- Interpreter.find(options.python_executable),
         {:ok, source} <- script(options.script_path),
         {:ok, output} <- probe(python, Enum.uniq(Enum.flat_map(required, &names/1)), options),
         {:ok, version, found, bridge?} <- read(output, python),
         :ok <- version(version, python),
         {:ok, packages} <- packages(required, found, python),
         :ok <- bridge_package(bridge?, source, python, options.script_path) do
      {:ok,
       %{
         python_path: python,
         script_path: options.script_path,
         python_version: version,
         dspy_version: found["dspy"] || found["dspy-ai"],
         packages: packages
       }}
    end
  end

  ## Configuration

  defp configuration do
    config = Application.get_env(:dspex, :python_environment, [])

    if Keyword.keyword?(config) do
      required = Keyword.get(config, :required_packages, @default_packages)

      case Enum.find_value(config, &refusal/1) do
        nil -> {:ok, required}
        text -> {:error, "config :dspex, :python_environment: " <> text}
      end
    else
      {:error, "config :dspex, :python_environment: expected a keyword list"}
    end
  end

  defp refusal({:virtual_env, nil}), do: nil
  defp refusal({:virtual_env, path}) when is_binary(path) and path != "", do: nil

  defp refusal({:virtual_env, other}),
    do: "virtual_env: expected the path of a folder, got #{inspect(other)}"

  # Names become arguments of the interpreter.
  defp refusal({:required_packages, packages}) do
    if is_list(packages) and
         Enum.all?(packages, &(is_binary(&1) and &1 =~ ~r/\A[A-Za-z0-9][A-Za-z0-9._-]*\z/)),
       do: nil,
       else: "required_packages: expected a list of package names, got #{inspect(packages)}"
  end

  defp refusal({key, _value}), do: "#{key}: there is no such setting"

  defp bridge_options, do: named(Options.new(), ":python_bridge")
  defp monitor_options, do: named(Monitor.options(), ":python_bridge_monitor")

  defp named({:ok, options}, _key), do: {:ok, options}

  defp named({:error, error}, key),
    do: {:error, "config :dspex, #{key}: " <> Exception.message(error)}

  ## Script

  defp script(path) do
    case File.read(path) do
      {:ok, source} ->
        case Enum.reject(@script_texts, &String.contains?(source, &1)) do
          [] -> {:ok, source}
          missing -> {:error, "#{path} is no script of the bridge: it lacks #{list(missing)}"}
        end

      {:error, :enoent} ->
        {:error, "script not found: #{path}"}

      {:error, reason} ->
        {:error, "script not readable: #{path} (#{:file.format_error(reason)})"}
    end
  end

  ## Interpreter

  defp probe(python, names, options) do
    # A process of its own, without links: the port's messages and its exits are nobody else's.
    args = ["-c", @probe, options.script_path | names]
    {_pid, ref} = spawn_monitor(fn -> exit({:probed, run(python, args, options)}) end)

    receive do
      {:DOWN, ^ref, :process, _pid, {:probed, result}} ->
        result

      {:DOWN, ^ref, :process, _pid, _crash} ->
        {:error, "#{python} cannot be run: the check failed"}
    end
  end

  defp run(python, args, options) do
    env = for {name, value} <- options.env.(), do: {to_charlist(name), to_charlist(value)}
    port_options = [:binary, :exit_status, :stderr_to_stdout, args: args, env: env]
    port = Port.open({:spawn_executable, python}, port_options)
    {:os_pid, os_pid} = Port.info(port, :os_pid) || {:os_pid, nil}
    deadline = System.monotonic_time(:millisecond) + @time_limit_ms
    collect(port, os_pid, python, deadline, "")
  rescue
    error in [ErlangError, ArgumentError] ->
      {:error, "#{python} cannot be run: #{Interpreter.start_failure(error)}"}
  end

  defp collect(port, os_pid, python, deadline, output) do
    receive do
      {^port, {:data, data}} when byte_size(output) < @max_output_bytes ->
        collect(port, os_pid, python, deadline, output <> data)

      {^port, {:data, _too_much}} ->
        collect(port, os_pid, python, deadline, output)

      {^port, {:exit_status, 0}} ->
        {:ok, output}

      {^port, {:exit_status, status}} ->
        {:error, "#{python} cannot be run: exit status #{status}#{last_line(output)}"}
    after
      max(deadline - System.monotonic_time(:millisecond), 0) ->
        Port.close(port)
        if os_pid, do: OsProcess.kill_group(os_pid, OsProcess.start_time(os_pid))
        {:error, "#{python} cannot be run: no answer within #{@time_limit_ms} ms"}
    end
  end

  defp read(output, python) do
    # Other lines may stand around it: warnings, what a sitecustomize prints.
    answers = for "DSPEX {" <> answer <- String.split(output, "\n"), do: "{" <> answer

    with [answer | _rest] <- answers,
         {:ok, %{"version" => version, "found" => found} = all} <-
           JSON.decode(String.trim(answer)) do
      {:ok, version, found, Map.get(all, "bridge", true)}
    else
      _other -> {:error, "#{python} cannot be run: it is no Python#{last_line(output)}"}
    end
  end

  defp version(version, python) do
    [major, minor | _rest] = version |> String.split(".") |> Enum.map(&String.to_integer/1)
    {min_major, min_minor} = @min_python

    if {major, minor} >= @min_python,
      do: :ok,
      else:
        {:error, "Python too old: #{python} is #{version}, needed is #{min_major}.#{min_minor}"}
  end

  ## Packages

  # DSPy was called dspy-ai once, and either name may be required or installed.
  defp names(name) when name in ["dspy", "dspy-ai"], do: ["dspy", "dspy-ai"]
  defp names(name), do: [name]

  defp packages(required, found, python) do
    versions = Map.new(required, &{&1, Enum.find_value(names(&1), fn name -> found[name] end)})

    case for name <- required, versions[name] == nil, do: name do
      [] ->
        {:ok, versions}

      missing ->
        {:error,
         "missing in #{python}: #{list(missing)} (pip install #{Enum.join(missing, " ")})"}
    end
  end

  # A script of another kind brings what it needs.
  defp bridge_package(bridge?, source, python, script) do
    if bridge? or not String.contains?(source, "from dspy_bridge"),
      do: :ok,
      else:
        {:error,
         "the package dspy_bridge is neither beside #{script}, as in a checkout, nor installed " <>
           "in #{python} (install it for that interpreter)"}
  end

  defp list(texts), do: Enum.map_join(texts, ", ", &"`#{&1}`")

  defp last_line(output) do
    case output |> String.split("\n", trim: true) |> List.last() do
      nil -> ""
      line -> ": " <> String.slice(line, 0, 200)
    end
  end
end
