defmodule DSPex.PythonBridge.Bridge.StartDiagnosisTest do
  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Options
  alias DSPex.PythonBridge.Bridge.StartDiagnosis

  defp last_line(fake, opts) do
    {:ok, options} = Options.new(fake_opts(fake, opts))
    StartDiagnosis.last_line(options, self())
  end

  test "is the last line of standard error" do
    assert last_line("dies_at_start", env: %{"FAKE_SAYS" => "one\ntwo\n\n"}) == "two"
    assert last_line("dies_at_start", []) == nil
    assert last_line("echo", []) == nil
    assert last_line("no_such_script", []) =~ "No such file"
    assert last_line("echo", python_executable: "/no/such/python") == nil
  end

  test "has no secret from options or environment, and no part of one" do
    key = "sk-ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    env = &%{"FAKE_SAYS" => &1, "MY_AUTH" => key}
    assert last_line("dies_at_start", env: env.("#{key}!")) == "[redacted]!"
    cut = last_line("dies_at_start", env: env.(String.duplicate("x", 480) <> key))
    assert String.length(cut) == 490 and not (cut =~ "sk-")
    # Of one that is longer than is read, nothing is shown.
    assert last_line("dies_at_start", env: env.(String.duplicate(key, 3_000))) == nil

    options = %{extra_headers: %{"Authorization" => "Bearer #{key}"}, list: ["another-#{key}"]}
    says = %{"FAKE_SAYS" => "Bearer #{key} another-#{key}"}
    assert last_line("dies_at_start", lm_options: options, env: says) == "[redacted] [redacted]"
  end

  @tag :tmp_dir
  test "leaves no process when its owner ends, even if the peer hangs", %{tmp_dir: dir} do
    file = Path.join(dir, "pid")
    {:ok, options} = Options.new(fake_opts("hangs", env: %{"FAKE_FILE" => file}))
    owner = spawn(fn -> Process.sleep(:infinity) end)
    task = Task.async(fn -> StartDiagnosis.last_line(options, owner) end)

    os_pid =
      eventually(fn ->
        with {:ok, pid} when pid != "" <- File.read(file), do: pid, else: (_ -> nil)
      end)

    assert alive?(os_pid)
    Process.exit(owner, :kill)
    assert Task.await(task) == nil
    eventually(fn -> not alive?(os_pid) end)
  end
end
