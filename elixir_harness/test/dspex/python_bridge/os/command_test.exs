defmodule DSPex.PythonBridge.OS.CommandTest do
  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.OS

  doctest OS.Command

  @moduletag :tmp_dir

  defp sh(script, opts \\ []), do: OS.Command.run("/bin/sh", ["-c", script], opts)

  # A shell and its child, which write their numbers and hang.
  defp hanging(dir), do: "sleep 600 & echo $$ $! > #{dir}/pids; wait"

  defp pids(dir) do
    eventually(fn ->
      with {:ok, text} <- File.read(Path.join(dir, "pids")),
           [_shell, _child] = pids <- String.split(text),
           do: pids,
           else: (_not_yet -> nil)
    end)
  end

  test "returns the exit status and the output, standard error included" do
    assert sh("echo out; echo err >&2; exit 3") == {:exit, 3, "out\nerr\n"}
  end

  test "returns the end of a long output, as valid text" do
    assert {:exit, 0, output} = sh("yes | head -c 200000; printf 'end\\377'")
    assert byte_size(output) <= 65_600
    assert String.ends_with?(output, "end" <> "\uFFFD")
  end

  test "returns the end of a long last line, from its first blank on; nothing of a single word" do
    yes = "yes ab 2>/dev/null | head -c 300000 | tr '\\n' ' '"
    # It is cut after the first letter of an "ab".
    assert {:exit, 0, output} = sh("#{yes}; printf en")
    assert byte_size(output) == 65_534
    assert String.starts_with?(output, "ab ab ") and String.ends_with?(output, " ab en")
    # It may be the end of a secret.
    assert {:exit, 0, ""} = sh("#{yes} | tr -d ' '; echo end")
  end

  test "a program that cannot be run is an error", %{tmp_dir: dir} do
    assert OS.Command.run(Path.join(dir, "none"), []) == {:error, "no such file or directory"}
    File.write!(Path.join(dir, "text"), "echo no program")
    assert OS.Command.run(Path.join(dir, "text"), []) == {:error, "permission denied"}
    assert OS.Command.run(dir, []) == {:error, "permission denied"}
  end

  test "a program that takes too long is killed, with its children", %{tmp_dir: dir} do
    task = Task.async(fn -> sh(hanging(dir), limit_ms: 1_000) end)
    pids = pids(dir)
    assert Task.await(task) == {:error, "no answer within 1 s"}
    eventually(fn -> not Enum.any?(pids, &alive?/1) end)
  end

  test "a program whose caller dies is killed, with its children", %{tmp_dir: dir} do
    caller = spawn(fn -> sh(hanging(dir)) end)
    pids = pids(dir)
    Process.exit(caller, :kill)
    eventually(fn -> not Enum.any?(pids, &alive?/1) end)
  end

  test "starts in the given folder, without input", %{tmp_dir: dir} do
    assert sh("pwd; read line; echo $?", cd: dir) == {:exit, 0, "#{dir}\n1\n"}
  end

  test "does not outlive the BEAM", %{tmp_dir: dir} do
    code = "DSPex.PythonBridge.OS.Command.run(\"/bin/sh\", [\"-c\", #{inspect(hanging(dir))}])"
    ebin = Application.app_dir(:dspex, "ebin")

    beam =
      Port.open({:spawn_executable, System.find_executable("elixir")}, [
        :binary,
        args: ["-pa", ebin, "-e", "IO.puts System.pid(); " <> code]
      ])

    assert_receive {^beam, {:data, os_pid}}, 30_000
    pids = pids(dir)
    assert Enum.all?(pids, &alive?/1)
    kill(String.trim(os_pid))
    eventually(fn -> not Enum.any?(pids, &alive?/1) end)
  end
end
