defmodule Mix.Tasks.Dspex.OptimizeTest do
  @moduledoc "`mix dspex.optimize`: the file of the state, what is printed, its status."

  # It captures standard error and sets the configuration.
  use ExUnit.Case, async: false

  import DSPex.Test.EvalTask, only: [source: 2]
  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Evaluate}
  alias DSPex.Test.{EvalTask, OptimizingLM}
  alias Mix.Tasks.Dspex.Optimize

  @moduletag :tmp_dir

  # A bridge of the task's own imports DSPy for each run.
  @server __MODULE__.Server

  setup_all do
    start_supervised!({Bridge, real_opts(name: @server)})
    :ok
  end

  setup :only_python

  setup %{tmp_dir: dir} do
    %{lm: OptimizingLM.start(), out: Path.join(dir, "state.json")}
  end

  # `parts`: in place of the usual, or in addition to it.
  defp file(dir, {port, _requests}, parts \\ []) do
    usual = [
      server: inspect(@server),
      program: """
      %{id: "qa", signature: "question -> answer", lm: %{model: "openai/stub", api_key: "k", cache: false,
        api_base: "http://127.0.0.1:#{port}/v1"}}
      """,
      trainset: ~S|for n <- 1..6, do: {%{question: "word #{n}"}, %{answer: "WORD #{n}"}}|,
      metric: "{:field, :answer, :equals}",
      optimize: "[optimizer: :copro, options: [breadth: 3, depth: 2]]"
    ]

    parts = Keyword.merge(usual, parts)

    source(
      dir,
      "[" <> Enum.map_join(parts, ", ", fn {key, code} -> "#{key}: (#{code})" end) <> "]"
    )
  end

  defp run(args), do: EvalTask.run(args, Optimize)

  test "writes the state, which makes the program that it says", %{tmp_dir: dir, lm: lm, out: out} do
    path = file(dir, lm, server: "nil")
    assert %{status: 0} = result = run([path, "--out", out])
    assert result.out =~ ~r/\Ascore 1.000, before 0.000, \d+ candidates, /
    assert result.out =~ "\nthe state is in #{out}\n"
    assert result.err =~ ~r/^candidate \d+: 1.000 on 6 examples, in #{out}$/m
    assert Path.wildcard(out <> "*") == [out]

    state = JSON.decode!(File.read!(out))
    {model, options} = Keyword.pop!(OptimizingLM.opts(lm), :lm)
    lm = Map.new([model: model] ++ options[:lm_options])
    definition = %{id: "better", signature: "question -> answer", lm: lm, state: state}
    {:ok, _} = Bridge.call(@server, :create_program, definition, 60_000)
    metric = {:field, :answer, :equals}
    examples = OptimizingLM.examples(10)
    assert {:ok, %{score: 1.0}} = Evaluate.run(@server, "better", examples, metric: metric)
    {:ok, _} = Bridge.call(@server, :cleanup, %{program_ids: ["better"]})
  end

  test "flags replace the file's optimizer and budget", %{tmp_dir: dir, lm: lm, out: out} do
    # By one thread: those of others may be closed before they reach the LM when the budget is spent.
    parts = [optimize: "[optimizer: :simba, budget: [lm_calls: 1], num_threads: 1]"]
    path = file(dir, lm, parts)
    args = [path, "--out", out, "--optimizer", "copro", "--lm-calls", "20"]
    assert %{status: 0, out: printed} = run(args)
    assert printed =~ "20 LM calls" and printed =~ "stopped by lm_calls"
    assert OptimizingLM.requests(lm) == 20

    File.write!(out, "mine")
    args = [path, "--out", out, "--optimizer", "copro"]
    assert %{status: 2, text: "lm_calls were spent before the first candidate" <> _} = run(args)
    assert File.read!(out) == "mine"
  end

  test "a server of the application", %{tmp_dir: dir, lm: lm, out: out} do
    path =
      file(dir, lm,
        program: ~s|%{"id" => "qa", "signature" => "question -> answer"}|,
        optimize: "[optimizer: :labeled_few_shot, options: [k: 2]]"
      )

    assert %{status: 0, out: "score none" <> _} = run([path, "--out", out])
    assert %{"demos" => [_, _]} = JSON.decode!(File.read!(out))
    assert {:ok, %{"programs" => []}} = Bridge.call(@server, :list_programs)
  end

  test "what is wrong is named, and the file stays", %{tmp_dir: dir, lm: lm, out: out} do
    File.write!(out, "mine")
    path = file(dir, lm)

    for {args, text} <- [
          {[], "expected mix dspex.optimize FILE.exs --out"},
          {[path], "expected mix dspex.optimize FILE.exs --out"},
          {[path, "--out", out, "--lm-calls", "many"], "--lm-calls"},
          {[path, "--out", dir], "--out #{dir}: it is a folder; expected a file"},
          {[path, "--out", out, "--optimizer", "better"], "optimize.optimizer"},
          {[file(dir, lm, trainset: "nil"), "--out", out], ":trainset is missing"},
          {[file(dir, lm, trainset: "[]"), "--out", out], "at least one example"},
          {[file(dir, lm, optimize: "[seeds: 5]"), "--out", out], "unknown option :seeds"},
          {[file(dir, lm, optimize: "[]"), "--out", out], "optimize.optimizer: "},
          {[file(dir, lm, program: ~s|"qa"|, server: "Here"), "--out", out], "not an id"},
          {[file(dir, lm, metric: ~s|fn _, _ -> raise "mine" end|), "--out", out],
           "tool_error: metric:score: RuntimeError: mine"}
        ] do
      assert %{status: 2, text: message} = run(args)
      assert message =~ text
    end

    assert File.read!(out) == "mine"
    assert Path.wildcard(out <> "*") == [out]
  end

  test "what --out refuses costs no LM call; a link's target is replaced", %{
    tmp_dir: dir,
    lm: lm,
    out: out
  } do
    path = file(dir, lm)
    assert %{status: 2} = run([path, "--out", dir])
    assert OptimizingLM.requests(lm) == 0

    File.write!(out, "mine")
    File.chmod!(out, 0o600)
    File.ln_s!("state.json", link = Path.join(dir, "link"))
    assert %{status: 0} = run([path, "--out", link])
    assert File.read_link!(link) == "state.json"
    assert %{"signature" => _} = JSON.decode!(File.read!(out))
    assert Bitwise.band(File.stat!(out).mode, 0o777) == 0o600
    assert Path.wildcard(Path.join(dir, "*.part"), match_dot: true) == []
  end

  test "--require-gain, met and not met", %{tmp_dir: dir, lm: lm, out: out} do
    path = file(dir, lm)
    assert %{status: 0, out: printed} = run([path, "--out", out, "--require-gain", "1"])
    refute printed =~ "not better"

    # Nothing can be better than that, so the state is that of the program as it was.
    path = file(dir, lm, metric: "fn _, _ -> 1 end")
    assert %{status: 0, out: printed, err: told} = run([path, "--out", out])
    # COPRO scores two proposals first.
    assert told =~ "candidate 1: 1.000 on 6 examples, in" and told =~ "candidate 3: 1.000 on 6"
    assert printed =~ "score 1.000, before 1.000" and printed =~ "\nnot better than before\n"
    %{"signature" => %{"instructions" => kept}} = JSON.decode!(File.read!(out))
    assert kept == "Given the fields `question`, produce the fields `answer`."

    assert %{status: 1, err: told} = run([path, "--out", out, "--require-gain", "0.02"])
    assert told =~ "failed: the gain is 0.000, below --require-gain 0.02"
    assert %{status: 0} = run([path, "--out", out, "--require-gain", "0"])
  end

  test "killed, it leaves the best so far", %{tmp_dir: dir, lm: lm, out: out} do
    # The metric of later candidates never answers.
    metric = """
    fn _example, prediction ->
      right = prediction["answer"] != "no idea"
      if right, do: :counters.add(:persistent_term.get(:right), 1, 1)
      if :counters.get(:persistent_term.get(:right), 1) > 6, do: Process.sleep(:infinity)
      right
    end
    """

    counter = ":persistent_term.put(:right, :counters.new(1, []))"
    path = file(dir, lm, metric: metric, dataset: counter)
    task = start_supervised!({Task, fn -> run([path, "--out", out]) end})
    better? = &match?({:ok, _}, &1)
    eventually(fn -> better?.(File.read(out)) and File.read!(out) =~ "the capitals" end, 60_000)
    Process.exit(task, :kill)
    assert %{"signature" => %{"instructions" => _}} = JSON.decode!(File.read!(out))
  end
end
