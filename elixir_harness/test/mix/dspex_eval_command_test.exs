defmodule Mix.Tasks.Dspex.EvalCommandTest do
  @moduledoc "`mix dspex.eval` as a command: exit statuses, what goes where, a terminal, Ctrl-C."

  use ExUnit.Case, async: true

  import DSPex.Test.EvalTask, only: [file: 2]
  import DSPex.Test.Helpers

  alias DSPex.Test.SilentLM

  @moduletag :tmp_dir

  # Runs a command of the task's on a terminal of 70 columns: its input and output are this program's.
  @on_terminal ~S"""
  import os, pty, sys
  command = "stty cols 70; exec mix dspex.eval " + sys.argv[1]
  sys.exit(os.waitstatus_to_exitcode(pty.spawn(["sh", "-c", command])))
  """

  defp env, do: [{"MIX_ENV", "test"}, {"PYTHON_EXECUTABLE", python()}, {"DSPY_VENV", nil}]

  # Its standard output, standard error and exit status.
  defp mix(dir, args) do
    err = Path.join(dir, "stderr")
    command = ["-c", ~s(exec mix dspex.eval "$@" 2> "$0"), err | args]
    {out, status} = System.cmd("sh", command, env: env())
    {out, File.read!(err), status}
  end

  test "exits with 1 and 2; standard output is for the result alone", %{tmp_dir: dir} do
    path = file(dir, metric: ~s|fn _, _ -> require Logger; Logger.error("logged"); true end|)
    {out, err, 1} = mix(dir, [path, "--json", "--min", "2"])
    assert %{"ok" => false, "reasons" => ["below_min"], "score" => 1.0} = JSON.decode!(out)
    assert err =~ "failed: the score 1.000 is below --min 2.0"
    assert err =~ "logged" and err =~ "2/2 examples, 0 failed"
    refute err =~ "\r"

    {"", err, 2} = mix(dir, [path, "--json", "--baseline", Path.join(dir, "none.json")])
    assert err =~ "** (Mix) --baseline " and err =~ "no such file or directory"
  end

  test "on a terminal there is a line, which is gone before the result, and it exits with 0", %{
    tmp_dir: dir
  } do
    port = on_terminal(file(dir, []))
    assert {out, 0} = until_exit(port, "")
    assert [before, rest] = String.split(out, "\r\e[2K1/2 examples, 0 failed")
    refute before =~ "examples"
    assert "\r\e[2K2/2 examples, 0 failed\r\e[2Kscore 0.500, 2 examples" <> _ = rest
  end

  test "Ctrl-C closes all LM requests and leaves no peer", %{tmp_dir: dir} do
    {path, pid_file} = never_answered(dir)
    port = on_terminal(path)
    for _ <- 1..20, do: assert_receive({:lm_request, _line}, 30_000)
    beam = File.read!(pid_file)
    peers = descendants(beam)
    assert peers != []

    Port.command(port, <<3>>)
    until_output(port, "(a)bort")
    Port.command(port, <<3>>)
    assert {_out, _status} = until_exit(port, "")
    for _ <- 1..20, do: assert_receive(:lm_closed)
    refute_received {:lm_request, _line}
    eventually(fn -> not Enum.any?([beam | peers], &alive?/1) end)
  end

  test "SIGTERM does the same, and is no success", %{tmp_dir: dir} do
    {path, pid_file} = never_answered(dir)
    task = Task.async(fn -> mix(dir, [path]) end)
    for _ <- 1..20, do: assert_receive({:lm_request, _line}, 30_000)
    beam = File.read!(pid_file)
    peers = descendants(beam)
    {_, 0} = System.cmd("kill", ["-TERM", beam])
    assert {"", _err, 143} = Task.await(task, 30_000)
    for _ <- 1..20, do: assert_receive(:lm_closed, 5_000)
    eventually(fn -> not Enum.any?(peers, &alive?/1) end)
  end

  # A file with 20 examples that an LM is asked and does not answer, and a file for the id of the task's process.
  defp never_answered(dir) do
    lm = SilentLM.start()

    program = """
    %{id: "a", signature: "question -> answer",
      lm: %{model: "openai/x", api_key: "k", cache: false, api_base: "http://127.0.0.1:#{lm}/v1"}}
    """

    pid_file = Path.join(dir, "pids")

    dataset = """
    (
      File.write!(#{inspect(pid_file)}, System.pid())
      for n <- 1..20, do: {%{question: "q\#{n}"}, %{answer: "x"}}
    )
    """

    {file(dir, program: program, dataset: dataset), pid_file}
  end

  defp on_terminal(path) do
    env = for {name, value} <- env(), do: {to_charlist(name), value && to_charlist(value)}
    env = for {name, value} <- env, do: {name, value || false}
    args = ["-c", @on_terminal, path]
    Port.open({:spawn_executable, python()}, [:binary, :exit_status, args: args, env: env])
  end

  defp until_output(port, text, read \\ "") do
    if not String.contains?(read, text) do
      assert_receive {^port, {:data, more}}, 30_000
      until_output(port, text, read <> more)
    end
  end

  defp until_exit(port, read) do
    receive do
      {^port, {:data, more}} -> until_exit(port, read <> more)
      {^port, {:exit_status, status}} -> {read, status}
    after
      30_000 -> flunk("it has not ended: " <> read)
    end
  end

  # The processes that a process of the system has started, and theirs.
  defp descendants(os_pid) do
    {all, 0} = System.cmd("ps", ["-eo", "pid=,ppid="])
    pairs = for line <- String.split(all, "\n", trim: true), do: String.split(line)
    below([os_pid], pairs)
  end

  defp below([], _pairs), do: []

  defp below(parents, pairs) do
    children = for [pid, parent] <- pairs, parent in parents, do: pid
    children ++ below(children, pairs)
  end
end
