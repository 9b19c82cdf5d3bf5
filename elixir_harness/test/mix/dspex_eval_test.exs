defmodule Mix.Tasks.Dspex.EvalTest do
  @moduledoc "`mix dspex.eval`, by a real peer whose LM is scripted: what it prints, its JSON and its status."

  # It captures standard error and sets the configuration.
  use ExUnit.Case, async: false

  import DSPex.Test.EvalTask, except: [file: 1, file: 2]
  import DSPex.Test.Helpers
  alias DSPex.PythonBridge.Bridge
  alias DSPex.Test.{EvalTask, Page}

  @moduletag :tmp_dir

  # A bridge of the task's own imports DSPy for each run.
  @server __MODULE__.Server

  setup_all do
    start_supervised!({Bridge, real_opts(name: @server)})
    :ok
  end

  setup :only_python

  # A file of the task whose server is that of all tests.
  defp file(dir, parts \\ []),
    do: EvalTask.file(dir, Keyword.put_new(parts, :server, inspect(@server)))

  describe "the result" do
    test "is a table with the worst first, of a bridge of the task's own", %{tmp_dir: dir} do
      assert %{status: 0, out: out, err: err} = run([EvalTask.file(dir)])

      assert [summary, _head, "1  0.000" <> peru, "0  1.000" <> _] =
               String.split(out, "\n", trim: true)

      assert summary =~ "score 0.500, 2 examples, 0 failed, 2 LM calls"
      assert peru =~ ~r/question: Peru +answer: Lima +answer: secret-answer/
      assert err == "1/2 examples, 0 failed\n2/2 examples, 0 failed\n"
    end

    test "of the guide's file is as shown there", %{tmp_dir: dir} do
      page = "docs/guide/evaluating.md"
      assert [code] = for("# eval/capital.exs\n" <> _ = code <- Page.blocks(page), do: code)
      path = source(dir, code)
      assert %{status: 1, out: out, err: err} = run([path, "--min", "0.8"])
      shown = String.replace(File.read!(Page.path(page)), ~r/\d\.\d s$/m, "SECONDS")
      assert String.contains?(shown, String.replace(out, ~r/\d\.\d s$/m, "SECONDS")), out
      for line <- String.split(err, "\n"), do: assert(String.contains?(shown, plain(line)))
    end

    defp plain(text), do: String.replace(text, ~r/\e\[\d*m/, "")

    test "exits with 1 if it is below --min, and with 0 if it is not", %{tmp_dir: dir} do
      path = file(dir)
      assert %{status: 0} = run([path, "--min", "0.5"])
      assert %{status: 1, out: "score 0.500" <> _, err: err} = run([path, "--min", "0.51"])
      assert err =~ "failed: the score 0.500 is below --min 0.51"
    end

    defp state_of(id) do
      args = %{program_ids: [id], state: true}
      {:ok, %{"details" => [details]}} = Bridge.call(@server, :list_programs, args)
      details["state"]
    end

    @learning ~S"""
    %{id: "capital", signature: "question -> answer", demos: [%{question: "Peru", answer: "?"}],
      lm: %{model: "offline/script", answers: %{"Peru" => %{answer: "Lima"}, "*" => %{answer: "?"}}}}
    """

    test "of --state is that of the program with this state", %{tmp_dir: dir} do
      definition = %{id: "learned", signature: "question -> answer", lm: %{model: "offline/echo"}}
      definition = Map.put(definition, :demos, [%{question: "Rome", answer: "Italy"}])
      {:ok, _} = Bridge.call(@server, :create_program, definition, 60_000)
      state = Path.join(dir, "state.json")
      File.write!(state, JSON.encode!(state_of("learned")))
      {:ok, _} = Bridge.call(@server, :cleanup, %{program_ids: ["learned"]})

      path = file(dir, program: @learning, metric: "fn _, _ -> 1 end")
      assert %{status: 0} = run([path, "--state", state])
      assert [%{"question" => "Rome", "answer" => "Italy"}] = state_of("capital")["demos"]

      for {file, text} <- [
            {Path.join(dir, "none.json"), "no such file or directory"},
            {write(dir, "[]"), "expected a JSON object, as mix dspex.optimize writes"},
            {write(dir, "{}"), ":program: invalid_args: state"}
          ] do
        assert %{status: 2, text: refusal} = run([path, "--state", file])
        assert refusal =~ text
      end

      path = file(dir, program: ~s|"capital"|)
      assert %{status: 2, text: text} = run([path, "--state", state])
      assert text =~ ":program: --state needs a definition, not an id"
    end

    test "of hundreds of examples prints the ten worst", %{tmp_dir: dir} do
      dataset = ~s|Stream.map(1..400, &{%{question: "q\#{&1}"}, %{answer: "x"}})|
      assert %{status: 0, out: out, err: err} = run([file(dir, dataset: dataset)])
      assert [first | _] = lines = String.split(err, "\n", trim: true)
      assert {length(lines), first} == {10, "40/400 examples, 0 failed"}
      assert [_summary, _head | rows] = String.split(out, "\n", trim: true)
      assert length(rows) == 11 and List.last(rows) == "… and 390 more, with no lower scores"
    end
  end

  describe "--json" do
    test "standard output has an object with the documented keys and no contents", %{tmp_dir: dir} do
      code = """
      IO.puts("printed by the file")
      [server: #{inspect(@server)}, program: (#{program()}), dataset: [%{question: "Italy"}, %{question: "Peru"}],
       metric: fn _example, _prediction -> IO.puts("printed by the metric"); {0.25, "secret-feedback"} end]
      """

      assert %{status: 1, out: out, err: err, json: json} =
               json([source(dir, code), "--min", "0.8"])

      assert %{
               "version" => 1,
               "ok" => false,
               "reasons" => ["below_min"],
               "program" => "capital",
               "score" => 0.25,
               "examples" => 2,
               "failed" => 0,
               "min" => 0.8,
               "tolerance" => +0.0,
               "baseline" => nil,
               "usage" => %{"lm_calls" => 2},
               "duration_ms" => _,
               "results" => [%{"id" => id, "score" => 0.25, "error" => nil}, %{"id" => other}]
             } = json

      assert map_size(json) == 13
      assert id =~ ~r/\A[0-9a-f]{16}\z/ and id != other
      refute out =~ "secret" or out =~ "Italy" or out =~ "Lima"
      assert err =~ "printed by the file" and err =~ "printed by the metric"
      assert err =~ "failed: the score 0.250 is below --min 0.8"
    end

    test "the same inputs have the same id, and each its own", %{tmp_dir: dir} do
      dataset =
        ~s|[{%{question: "a", more: 1}, nil}, {%{"more" => 1, "question" => "a"}, nil}, %{question: "b"}]|

      program =
        ~s|%{id: "capital", signature: "question, more: int -> answer", lm: "offline/echo"}|

      path = file(dir, program: program, dataset: dataset, metric: "fn _, _ -> 1 end")

      assert %{json: %{"results" => [%{"id" => one}, %{"id" => two}, %{"id" => three}]}} =
               json([path])

      # Of {"more":1,"question":"a"}: baselines outlive versions of this library, of Elixir and of OTP.
      assert one == "253ffe9486a06979"
      assert two == one <> "-2" and not String.starts_with?(three, one)
    end
  end

  describe "--baseline" do
    test "a loss beyond --tolerance exits with 1, and is shown", %{tmp_dir: dir} do
      path = file(dir)
      same = baseline(dir, path, [1.0, 0.0])
      assert %{status: 0, out: out} = run([path, "--baseline", same])

      assert out =~
               "#{same}: 0.500 → 0.500 (+0.000) on the 2 examples that it has; 0 new, 0 gone\nnothing got worse\n"

      better = baseline(dir, path, [1.0, 0.5])
      assert %{status: 1, out: out, err: err} = run([path, "--baseline", better])
      assert err =~ "failed: the score has changed by -0.250: a regression beyond --tolerance 0.0"

      assert [_, worse] = String.split(out, "1 got worse, the worst of them:\n")

      assert worse =~
               ~r/\A +score +before +inputs .*\n1  0\.000  0\.500   question: Peru .*secret-answer\n\z/

      assert %{status: 0} = run([path, "--baseline", better, "--tolerance", "0.25"])
      assert %{status: 1} = run([path, "--baseline", better, "--tolerance", "0.24"])
    end

    test "finds the examples of a dataset that has grown and has another order", %{tmp_dir: dir} do
      base = baseline(dir, file(dir), [1.0, 1.0])

      dataset =
        ~s|[%{question: "new"}, {%{"question" => "Peru"}, %{answer: "Lima"}}, {%{question: "newer"}, nil}]|

      path = file(dir, dataset: dataset, metric: ~s|fn e, p -> e["answer"] == p["answer"] end|)

      assert %{status: 1, json: %{"baseline" => change, "reasons" => reasons}} =
               json([path, "--baseline", base])

      assert reasons == ["regression"]
      assert %{"shared" => 1, "new" => 2, "gone" => 1, "worse" => 1} = change
      assert %{"before" => 1.0, "now" => +0.0, "change" => -1.0, "worst" => [worst]} = change
      assert %{"index" => 1, "before" => 1.0, "score" => +0.0, "id" => _} = worst
      assert map_size(change) == 8
    end

    test "a file that is not one exits with 2 before any LM call, and says why", %{tmp_dir: dir} do
      path = file(dir, metric: ~s|fn _, _ -> raise "an LM was asked" end|)
      expected = "expected the output of mix dspex.eval --json, version 1"

      for {bytes, text} <- [
            {"{", expected},
            {"[]", expected},
            {~s({"version": 2, "results": [{"id": "a", "score": 1}]}), expected},
            {~s({"version": 1, "results": [{"id": "a", "score": null}]}), expected},
            {~s({"version": 1, "results": [{"id": "a", "score": 1}]}), "none of the examples"}
          ] do
        base = write(dir, bytes)
        assert %{status: 2, out: "", text: refusal} = run([path, "--baseline", base])
        assert String.starts_with?(refusal, "--baseline #{base}: ") and refusal =~ text
      end

      assert %{status: 2, text: text} = run([path, "--baseline", Path.join(dir, "none.json")])
      assert text =~ "none.json: no such file or directory; mix dspex.eval --json makes one"
    end
  end

  test ":server: programs there may be named", %{tmp_dir: dir} do
    assert %{status: 0} = run([file(dir)])
    assert %{json: %{"program" => "capital"}} = json([file(dir, program: ~s("capital"))])
    assert %{status: 2, text: text} = run([file(dir, program: ~s("gone"))])
    assert text =~ "program_not_found: "
    assert %{status: 2, text: text} = run([file(dir, server: "Nobody")])
    assert text =~ "the bridge Nobody is not running"
  end

  describe "what is wrong exits with 2" do
    test "of standard output", %{tmp_dir: dir} do
      {:ok, full} = StringIO.open("")
      {:ok, _} = StringIO.close(full)
      leader = Process.group_leader()

      for switches <- [[], ["--json"]] do
        ExUnit.CaptureIO.capture_io(:stderr, fn ->
          Process.group_leader(self(), full)
          error = catch_error(Mix.Tasks.Dspex.Eval.run([file(dir) | switches]))
          Process.group_leader(self(), leader)
          assert %Mix.Error{mix: 2, message: "standard output: the result could not" <> _} = error
        end)
      end
    end

    test "of the file, which the text names", %{tmp_dir: dir} do
      for {path, expected} <- [
            {Path.join(dir, "none.exs"), "could not load"},
            {source(dir, "%{"), "TokenMissingError"},
            {source(dir, "raise \"broken\""), "(RuntimeError) broken"},
            {source(dir, "exit(:gone)"), "(exit) :gone"},
            {source(dir, "%URI{}"), ": its last value has to be a map or keyword list"},
            {source(dir, "[]"), ": :program is missing"},
            {source(dir, "[program: :a, metric: 1]"), ": :dataset is missing"},
            {file(dir, metric: "5"), ":metric: expected a function of two or three arguments"},
            {file(dir, datsets: "[]"), ": unknown option :datsets, did you mean :dataset?"},
            {file(dir, options: "[max_concurency: 2]"), "did you mean :max_concurrency?"},
            {file(dir, server: "nil", program: ~s("qa")), ":program: an id needs :server"},
            {file(dir, program: "NoSuchModule"), ":program: there is no such module"},
            {file(dir, program: ~s(%{id: "a", signature: "a"})), ":program: "},
            {file(dir, dataset: "[%{question: 1}, 5]"),
             ":dataset[1]: expected {inputs, expected}"},
            {file(dir, dataset: "[%{question: {1}}]"),
             ":dataset[0]: inputs.question: a tuple has"},
            {file(dir, metric: ~s|fn _, _ -> raise "broken" end|),
             ": tool_error: metric:score: "},
            {file(dir, dataset: "[{%{qestion: 1}, %{answer: \"1\"}}]"),
             "all runs failed, the first with: "}
          ] do
        assert %{status: 2, out: "", text: text} = run([path, "--json"])
        assert text =~ expected
        # Nothing of Elixir's own evaluation, which would hide it.
        refute text =~ "erl_eval"
      end
    end

    test "of the arguments and of Python", %{tmp_dir: dir} do
      path = file(dir)

      for {args, expected} <- [
            {[], "expected one file"},
            {[path, path], "expected one file"},
            {[path, "--mni", "1"], "--mni"},
            {[path, "--min", "nan"], "--min"}
          ] do
        assert %{status: 2, out: "", text: text} = run(args)
        assert text =~ expected
      end

      put_system_env("PYTHON_EXECUTABLE", "/no/python")
      assert %{status: 2, text: "no Python found: " <> text} = run([EvalTask.file(dir)])
      assert text =~ "; see mix dspex.doctor"
    end

    test "but a program whose every output is wrong has the score 0", %{tmp_dir: dir} do
      program =
        ~s|%{id: "a", signature: "question -> answer: int", lm: %{model: "offline/script", answers: %{"*" => %{answer: "?"}}}}|

      inputs = "[%{question: 1}, %{question: 2}]"
      path = file(dir, program: program, dataset: inputs, metric: "fn _, _ -> 1 end")
      assert %{status: 0, out: "score 0.000, 2 examples, 2 failed" <> _} = run([path])
    end
  end
end

defmodule Mix.Tasks.Dspex.CommandsTest do
  @moduledoc "`mix dspex.eval` and `mix dspex.optimize` as commands, in a BEAM of their own."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.Test.{EvalTask, SilentLM}

  @moduletag :tmp_dir

  # Its standard output, standard error and exit status.
  defp mix(dir, task, args) do
    err = Path.join(dir, task)
    command = ["-c", ~s(exec mix "$@" 2> "$0"), err, task | args]
    env = [{"MIX_ENV", "test"}, {"PYTHON_EXECUTABLE", python()}, {"DSPY_VENV", nil}]
    {out, status} = System.cmd("sh", command, env: env)
    {out, File.read!(err), status}
  end

  test "the result is alone on standard output", %{tmp_dir: dir} do
    metric = ~s|fn _, _ -> require Logger; Logger.error("logged"); true end|
    path = EvalTask.file(dir, metric: metric)
    {out, err, 1} = mix(dir, "dspex.eval", [path, "--json", "--min", "2"])
    assert %{"ok" => false, "reasons" => ["below_min"], "score" => 1.0} = JSON.decode!(out)
    assert err =~ "failed: the score 1.000 is below --min 2.0"
    assert err =~ "logged" and err =~ "2/2 examples, 0 failed"
  end

  # The second SIGINT ends the BEAM, once it asks what the first one meant.
  defp killed(signal, pid, task) do
    System.cmd("kill", ["-" <> signal, pid], stderr_to_stdout: true)

    with nil <- Task.yield(task, 300),
         do: killed(signal, pid, task),
         else: ({:ok, ended} -> ended)
  end

  test "SIGTERM, and Ctrl-C twice, close all LM requests", %{tmp_dir: dir} do
    lm = SilentLM.start()

    program = """
    %{id: "a", signature: "question -> answer",
      lm: %{model: "openai/x", api_key: "k", cache: false, api_base: "http://127.0.0.1:#{lm}/v1"}}
    """

    out = Path.join(dir, "state.json")
    optimize = "[optimizer: :copro, options: [breadth: 2, depth: 1]]"

    tasks =
      for {signal, status, task, key, args} <- [
            {"TERM", 143, "dspex.eval", :dataset, []},
            {"TERM", 143, "dspex.optimize", :trainset, ["--out", out]},
            {"INT", 0, "dspex.optimize", :trainset, ["--out", out]}
          ] do
        pid = Path.join(dir, "pid#{System.unique_integer()}")
        examples = ~S|for n <- 1..20, do: {%{question: "q#{n}"}, %{answer: "x"}}|
        examples = "(File.write!(#{inspect(pid)}, System.pid()); #{examples})"
        path = EvalTask.file(dir, [{key, examples}, program: program, optimize: optimize])
        {signal, status, pid, Task.async(fn -> mix(dir, task, [path | args]) end)}
      end

    for _ <- 1..22, do: assert_receive({:lm_request, _line}, 30_000)

    for {signal, status, pid, task} <- tasks,
        do: assert({_out, _err, ^status} = killed(signal, File.read!(pid), task))

    for _ <- 1..22, do: assert_receive(:lm_closed, 5_000)
  end
end
