defmodule DSPex.PythonBridge.OS.CommandTest do
  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.OS

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

  test "returns the end of a long output from its first whole line on, as valid text" do
    assert {:exit, 0, output} = sh("yes abc | head -c 200000; printf 'end\\377'")
    assert byte_size(output) <= 65_600
    assert String.starts_with?(output, "abc\n") and String.ends_with?(output, "end" <> "\uFFFD")
    # A single word may be the end of a secret.
    assert {:exit, 0, ""} = sh("head -c 300000 /dev/zero | tr '\\0' x")
  end

  test "a program that cannot be run exits as in a shell", %{tmp_dir: dir} do
    assert {:exit, 127, _why} = OS.Command.run(Path.join(dir, "none"), [])
    assert {:exit, 126, _why} = OS.Command.run(dir, [])
  end

  test "a program that takes too long is killed, with its children", %{tmp_dir: dir} do
    # As long as it takes to start.
    [_shell, _child] =
      pids =
      Enum.find_value([500, 5_000, 30_000], fn limit ->
        assert sh(hanging(dir), limit_ms: limit) == {:error, "no answer within #{limit} ms"}

        with {:ok, text} <- File.read(Path.join(dir, "pids")),
             do: String.split(text),
             else: (_ -> nil)
      end)

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
end
