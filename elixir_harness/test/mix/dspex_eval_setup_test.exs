defmodule Mix.Tasks.Dspex.EvalSetupTest do
  @moduledoc "`mix dspex.eval`: the server, and files, arguments and machines with which nothing can be measured."

  # It captures standard error and sets the configuration.
  use ExUnit.Case, async: false

  import DSPex.Test.EvalTask
  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Pool
  alias DSPex.PythonBridge.Top.Finder
  alias DSPex.Test.Loopback

  @moduletag :tmp_dir

  # A bridge of the task's own imports DSPy for each run.
  @server __MODULE__.Server

  setup_all do
    programs = [
      %{
        id: "old",
        signature: "question -> answer",
        lm: %{model: "offline/script", answers: %{"*" => %{answer: "Rome"}}}
      }
    ]

    pool = [name: @server, pool_size: 1, python_executable: python(), programs: programs]
    start_supervised!({Pool, pool})
    :ok
  end

  setup :only_python

  describe ":server" do
    test "is the application's, whose programs may be named, and which goes on", %{
      tmp_dir: dir
    } do
      parts = [server: inspect(@server), metric: ~s|fn _, p -> p["answer"] == "Rome" end|]

      assert %{json: %{"score" => 1.0, "program" => "old"}} =
               json([file(dir, [program: ~s("old")] ++ parts)])

      lm = ~s|%{model: "offline/script", answers: %{"*" => %{answer: "Rome"}}}|
      new = ~s|[id: "new", signature: "question -> answer", lm: #{lm}]|

      assert %{json: %{"score" => 1.0, "program" => "new"}} =
               json([file(dir, [program: new] ++ parts)])

      assert {:ok, %{"programs" => programs}} = Pool.call(@server, :list_programs)
      assert "new" in programs and "old" in programs
    end

    test "that is not running, or has no such program, exits with 2", %{tmp_dir: dir} do
      for {server, program, expected} <- [
            {"Nobody", program(), "the bridge Nobody is not running"},
            {~s("text"), program(), "is not running"},
            {inspect(@server), ~s("gone"), "program_not_found: "}
          ] do
        assert %{status: 2, text: text} = run([file(dir, server: server, program: program)])
        assert text =~ expected
      end
    end
  end

  describe "a broken set-up exits with 2" do
    test "of the file: its text names the file and what was expected", %{tmp_dir: dir} do
      examples = "expected {inputs, expected}, two maps, or a map of inputs"

      for {path, expected} <- [
            {source(dir, "%{"), "TokenMissingError"},
            {source(dir, "raise \"broken\""), "(RuntimeError) broken"},
            {source(dir, "throw(:ball)"), "(throw) :ball"},
            {source(dir, "exit(:gone)"), "(exit) :gone"},
            {source(dir, <<255>>), "invalid encoding"},
            {source(dir, ""),
             "its last value has to be a map or keyword list with the keys :program, "},
            {source(dir, "[1]"), "its last value has to be"},
            {source(dir, "%URI{}"), "its last value has to be"},
            {source(dir, ~s(%{"program" => 1})), "its last value has to be"},
            {source(dir, "[]"), ":program is missing; expected a definition, "},
            {source(dir, "[program: :a, metric: 1]"),
             ":dataset is missing; expected an enumerable"},
            {file(dir, metric: "nil"),
             ":metric is missing; expected a function of two or three arguments"},
            {file(dir, metric: "5"), ":metric: expected a function of two or three arguments"},
            {file(dir, datsets: "[]"), "unknown option :datsets, did you mean :dataset?"},
            {file(dir, options: "5"), ":options: expected a keyword list"},
            {file(dir, options: "[max_concurency: 2]"), "did you mean :max_concurrency?"},
            {file(dir, options: "[metric: 5]"), ":options: :metric cannot be one of them"},
            {file(dir, program: ~s("qa")), ":program: an id needs :server"},
            {file(dir, program: "NoSuchModule"), ":program: there is no such module"},
            {file(dir, program: ~s(%{signature: "a -> b"})), ":program: it has no id"},
            {file(dir, server: inspect(@server), program: ~s(%{id: "a", signature: "a"})),
             ":program: "},
            {file(dir, dataset: "5"), ":dataset: expected an enumerable of {inputs, expected}"},
            {file(dir, dataset: "[]"), ":dataset: it has no examples"},
            {file(dir, dataset: "%{a: 1}"), ":dataset[0]: #{examples}"},
            {file(dir, dataset: "[%{question: 1}, 5]"), ":dataset[1]: #{examples}"},
            {file(dir, dataset: "[%{question: {1}}]"),
             ":dataset[0]: inputs.question: a tuple has no JSON form"},
            {file(dir, dataset: ~s|File.stream!("none.csv")|),
             ":dataset: it cannot be read: ** (File.Error)"},
            {file(dir, dataset: "[%{} \| 5]"), ":dataset: it cannot be read: "},
            {Path.join(dir, "none.exs"), "no such file or directory"}
          ] do
        assert %{status: 2, out: "", text: text} = run([path])
        assert String.starts_with?(text, path <> ": "), text
        assert text =~ expected
        # Nothing of Elixir's own evaluation, which would hide it.
        refute text =~ "erl_eval"
      end
    end

    test "of the arguments", %{tmp_dir: dir} do
      path = file(dir)

      for {args, expected} <- [
            {[], "expected one file"},
            {[path, path], "expected one file"},
            {[path, "--mni", "1"], "--mni"},
            {[path, "--min", "nan"], "--min"},
            {[path, "--min"], "--min"},
            {[path, "--tolerance", "0.1"], "--tolerance: it needs --baseline"},
            {[path, "--baseline", path, "--tolerance", "-0.1"],
             "--tolerance: expected 0 or more, got -0.1"}
          ] do
        assert %{status: 2, out: "", text: text} = run(args)
        assert text =~ expected
      end
    end

    test "of Python, the LM, or the metric", %{tmp_dir: dir} do
      refused =
        "HTTP/1.1 401 Unauthorized\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"

      port =
        Loopback.start(fn socket, _owner ->
          Loopback.answer_requests(socket, fn -> refused end)
        end)

      openai =
        &~s|%{id: "a", signature: "question -> answer", lm: %{model: "openai/x", api_key: "k", api_base: "http://127.0.0.1:#{&1}/v1", num_retries: 0}}|

      for {parts, expected} <- [
            {[program: openai.(port)], "lm_error: "},
            # Nobody listens there.
            {[program: openai.(1)], "lm_error: all runs failed, the first with: "},
            {[program: ~s|%{id: "a", signature: "question -> answer"}|], "lm_not_configured: "},
            {[metric: ~s|fn _, _ -> raise "broken" end|], "tool_error: metric:score: "},
            {[metric: "{:field, :anwser, :f1}"], "invalid_args: "},
            {[dataset: "[{%{qestion: 1}, %{answer: \"2\"}}]"],
             "all runs failed, the first with: inputs.qestion"}
          ] do
        path = file(dir, [server: inspect(@server)] ++ parts)
        assert %{status: 2, out: "", text: text} = run([path, "--json"])
        assert String.starts_with?(text, path <> ": "), text
        assert text =~ expected
      end

      put_system_env("PYTHON_EXECUTABLE", "/no/python")
      assert %{status: 2, text: "no Python found: " <> text} = run([file(dir)])
      assert text =~ "; see mix dspex.doctor"
      put_config(:python_bridge, max_retrys: 1)
      assert %{status: 2, text: text} = run([file(dir)])
      assert text =~ "did you mean :max_retries?"
    end

    test "of the project, which is compiled and started first", %{tmp_dir: dir} do
      path = file(dir)

      for start <- [&__MODULE__.not_compiled/1, &__MODULE__.not_started/1] do
        name = Module.concat(__MODULE__, "Project#{System.unique_integer([:positive])}")
        aliases = ["app.config": &__MODULE__.nothing/1, "app.start": start]
        project = Macro.escape(app: :another, version: "0.1.0", aliases: aliases)
        code = quote(do: def(project, do: unquote(project)))
        Module.create(name, code, Macro.Env.location(__ENV__))
        Mix.Project.push(name)

        try do
          assert %{status: 2, out: ""} = run([path, "--json"])
        after
          Mix.Project.pop()
          # Mix prints once of which project the next lines are; those are another test's.
          Mix.shell().print_app()
        end
      end
    end

    test "but a program whose every output is wrong has the score 0", %{tmp_dir: dir} do
      program =
        ~s|%{id: "a", signature: "question -> answer: int", lm: %{model: "offline/script", answers: %{"*" => %{answer: "?"}}}}|

      inputs = "[%{question: 1}, %{question: 2}]"
      parts = [program: program, dataset: inputs, metric: "fn _, _ -> 1 end"]
      path = file(dir, [server: inspect(@server)] ++ parts)
      assert %{status: 0, out: "score 0.000, 2 examples, 2 failed" <> _} = run([path])
      assert %{status: 1} = run([path, "--min", "0.1"])
    end
  end

  test "the bridge of the task is gone after an error, too", %{tmp_dir: dir} do
    before = Finder.bridges()
    assert %{status: 2, text: text} = run([file(dir, metric: "fn _, _ -> nil end")])
    assert text =~ "tool_error: metric:score: "
    assert Finder.bridges() == before
  end

  def nothing(_args), do: :ok
  # As the compiler does, after its messages.
  def not_compiled(_args), do: exit({:shutdown, 1})
  def not_started(_args), do: Mix.raise("Could not start application another")
end
