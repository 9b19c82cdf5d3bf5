defmodule DSPex.PythonBridge.StubTest do
  use ExUnit.Case, async: true

  import ExUnit.CaptureLog

  alias DSPex.PythonBridge.{Bridge, Error, Pool, Stub}
  alias DSPex.Test.Helpers

  doctest DSPex.PythonBridge.Stub.Fields

  # One for all tests, as in an application.
  @stub __MODULE__.Shared

  setup_all do
    start_supervised!({Stub, name: @stub})
    # Started by another process than the tests.
    %{server: start_supervised!({Agent, fn -> nil end})}
  end

  defmodule Triage do
    use DSPex.PythonBridge.Program,
      program_type: "chain_of_thought",
      signature: [
        inputs: [ticket: :string],
        outputs: [team: {:enum, [:billing, :support]}, urgent: :boolean, why: :string]
      ],
      tools: [find: [args: [id: :integer], function: &__MODULE__.find/1]]

    def find(%{"id" => id}), do: "ticket #{id}"
  end

  defmodule Renamed do
    use DSPex.PythonBridge.Program, id: "first", signature: "question -> answer"
    def definition, do: Map.put(super(), :id, :second)
  end

  defmodule Raising do
    use DSPex.PythonBridge.Program, signature: "question -> answer"
    def definition, do: raise("no environment")
  end

  defp run(inputs \\ %{}, program \\ "qa"), do: %{program_id: program, inputs: inputs}

  defp call(inputs \\ %{}, opts \\ []),
    do: Bridge.request(@stub, :execute_program, run(inputs), opts)

  defp answer(value), do: fn _inputs -> {:ok, %{"answer" => value}} end

  # The log of errors is part of what a test shows.
  defp quietly(fun) do
    {result, log} = with_log(fun)
    assert log != ""
    result
  end

  describe "an expectation" do
    test "answers one run, with string keys in both directions" do
      Stub.expect(@stub, :qa, fn inputs ->
        {:ok, %{answer: inputs["question"], at: ~D[2026-01-02]}}
      end)

      assert {:ok, %{"answer" => "Why?", "at" => "2026-01-02"}, meta} = call(%{question: "Why?"})
      assert %{"lm_calls" => 0, "lm_usage" => %{}, "duration_ms" => _} = meta
      assert :ok = Stub.verify!(@stub)
    end

    test "comes before a stub, in their order; n times" do
      @stub
      |> Stub.stub("qa", answer("always"))
      |> Stub.expect("qa", answer("first"))
      |> Stub.expect("qa", 2, answer("then"))

      answers = for _ <- 1..5, do: elem(call(), 1)["answer"]
      assert answers == ~w(first then then always always)
    end

    test "serves a pool's call, too, and a list of inputs one by one" do
      Stub.expect(@stub, "qa", fn %{"n" => n} -> {:ok, %{"n" => n + 1}} end)
      assert {:ok, %{"n" => 2}} = Pool.call(@stub, :execute_program, run(%{n: 1}))

      Stub.expect(@stub, "qa", 2, fn %{"n" => n} -> {:ok, %{"n" => n + 1}} end)

      assert {:ok, %{"results" => [one, two, three]}, _} =
               quietly(fn -> call([%{n: 1}, %{n: 2}, %{n: 3}]) end)

      assert %{"success" => true, "result" => %{"n" => 2}} = one
      assert %{"success" => true, "result" => %{"n" => 3}} = two
      assert %{"success" => false, "error_type" => "program_not_found"} = three
    end
  end

  describe "answers belong to a test:" do
    test "many at once, with tasks of their own, see their own" do
      test = fn number ->
        Stub.expect(@stub, "qa", 10, fn %{"n" => n} -> {:ok, %{"answer" => [number, n]}} end)

        answers =
          1..10
          |> Task.async_stream(fn n -> elem(call(%{n: n}), 1)["answer"] end, max_concurrency: 10)
          |> Enum.map(fn {:ok, answer} -> answer end)

        assert answers == for(n <- 1..10, do: [number, n])
        assert :ok = Stub.verify!(@stub)
      end

      # Not tasks: each is a test of its own.
      tests = for number <- 1..50, do: spawn_monitor(fn -> test.(number) end)
      for {pid, ref} <- tests, do: assert_receive({:DOWN, ^ref, :process, ^pid, :normal}, 10_000)
    end

    test "a process that it has started uses them, also with a stream or tools" do
      test = self()
      Stub.stub(@stub, "qa", answer("mine"))

      spawn_link(fn ->
        spawn_link(fn ->
          [{:chunk, "answer", "mine"}, {:ok, _, _}] = Enum.to_list(Bridge.stream(@stub, run()))
          send(test, call(%{}, tools: %{a: fn _ -> 1 end}))
        end)

        Process.sleep(:infinity)
      end)

      assert_receive {:ok, %{"answer" => "mine"}, _meta}, 5_000
    end

    test "one that was there before is allowed, until the test ends", %{server: server} do
      ask = fn -> Agent.get(server, fn _ -> call() end) end

      owner =
        Task.async(fn ->
          Stub.expect(@stub, "qa", answer("the owner's"))
          receive do: (:allow -> Stub.allow(@stub, self(), server))
          receive do: (:stop -> :ok)
        end)

      %{pid: pid} = owner

      Helpers.eventually(fn ->
        {:error, %Error{type: :program_not_found, message: text}} = quietly(ask)
        text =~ "has no answer for it by this process. Another has"
      end)

      send(pid, :allow)
      Helpers.eventually(fn -> match?({:ok, %{"answer" => "the owner's"}, _}, ask.()) end)
      text = "uses the answers of #{inspect(pid)} already"
      assert_raise ArgumentError, ~r/#{text}/, fn -> Stub.allow(@stub, self(), server) end

      send(pid, :stop)
      Task.await(owner)
      Helpers.eventually(fn -> not Process.alive?(pid) end)
      @stub |> Stub.allow(self(), server) |> Stub.stub("qa", answer("mine"))
      assert {:ok, %{"answer" => "mine"}, _} = ask.()
    end

    test "the stub's own answers are for everyone else, and for casts" do
      test = self()

      own =
        start(
          answers: fn "qa", inputs ->
            send(test, {:asked, inputs})
            {:ok, %{"answer" => "anyone's"}}
          end
        )

      assert {:ok, %{"answer" => "anyone's"}} = Bridge.call(own, :execute_program, run())
      Stub.expect(own, "qa", answer("mine"))
      assert {:ok, %{"answer" => "mine"}} = Bridge.call(own, :execute_program, run())
      assert {:ok, %{"answer" => "anyone's"}} = Bridge.call(own, :execute_program, run())
      assert :ok = Bridge.cast(own, :execute_program, run(%{"a" => 1}))
      assert_receive {:asked, %{"a" => 1}}
    end
  end

  describe "verification" do
    test "names what has not come" do
      Stub.expect(@stub, "qa", 3, answer("1"))
      Stub.expect(@stub, "other", answer("1"))
      call()

      error = assert_raise RuntimeError, fn -> Stub.verify!(@stub) end
      assert error.message =~ ~s(#{inspect(@stub)}: 2 expected calls of program "qa" not made)
      assert error.message =~ ~s(#{inspect(@stub)}: 1 expected call of program "other" not made)
      assert :ok = Stub.verify!(start())
    end

    @tag :tmp_dir
    test "at the exit of a test, after its own stub has ended", %{tmp_dir: dir} do
      file = Path.join(dir, "inner_test.exs")

      File.write!(file, """
      ExUnit.start(seed: 0, colors: [enabled: false])

      defmodule InnerTest do
        use ExUnit.Case, async: true

        alias DSPex.PythonBridge.{Bridge, Stub}

        setup {Stub, :verify_on_exit!}
        setup do: (start_supervised!({Stub, name: Inner}); :ok)

        defp call, do: Bridge.call(Inner, :execute_program, %{program_id: "qa", inputs: %{}})

        test "met", do: (Stub.expect(Inner, "qa", fn _ -> {:ok, %{}} end); call())
        test "not met", do: Stub.expect(Inner, "qa", fn _ -> {:ok, %{}} end)
        test "failed", do: (Stub.expect(Inner, "qa", fn _ -> raise "boom" end); call())
      end
      """)

      paths = Enum.flat_map(:code.get_path(), &["-pa", to_string(&1)])
      {output, status} = System.cmd("elixir", paths ++ [file], stderr_to_stdout: true)
      assert status == 2
      assert output =~ "3 tests, 2 failures"
      assert output =~ ~s(Inner: 1 expected call of program "qa" not made)

      assert output =~
               "Inner: stub Inner, program qa: the answer's function: ** (RuntimeError) boom"
    end
  end

  describe "an answer" do
    test "is an error with its type, text, and what else it has" do
      error = %{Error.new(:lm_error, "rate limit") | retryable: true, meta: %{lm_calls: 2}}
      Stub.stub(@stub, "qa", fn _ -> {:error, error} end)
      assert {:error, %Error{type: :lm_error, retryable: true, meta: meta}} = call()
      assert %{"lm_calls" => 2, "cache_hits" => 0} = meta
      assert {:error, "rate limit"} = Pool.call(@stub, :execute_program, run())

      Stub.stub(@stub, "qa", fn _ -> {:error, "no"} end)
      assert {:error, %Error{type: :internal, message: "no", retryable: false}} = call()

      for type <- [:timeout, :overloaded, :python_process_died] do
        Stub.stub(@stub, "qa", fn _ -> {:error, type} end)
        assert {:error, type} == Bridge.call(@stub, :execute_program, run())
        assert [error: %Error{type: ^type}] = Enum.to_list(Pool.stream(@stub, run()))
      end
    end

    test "that is none, or cannot be one, is an error that says what is wrong" do
      own = start(programs: [%{id: "qa", signature: "question -> answer, why"}])
      run = fn -> Bridge.request(own, :execute_program, run(%{question: "?"})) end

      for {value, expected} <- [
            {:ok, "expected {:ok, outputs}, {:ok, outputs, meta} or {:error, error}"},
            {{:error, :bridge_not_running}, "expected {:ok, outputs}"},
            {{:ok, "text"}, "outputs: expected a map"},
            {{:ok, %{"answer" => {1, 2}}}, "outputs.answer: a tuple has no JSON form"},
            {{:ok, %{"anser" => "x", "why" => ""}},
             "outputs.anser: unknown field; outputs.answer: missing; expected answer, why"}
          ] do
        Stub.expect(own, "qa", fn _ -> value end)
        assert {:error, %Error{type: :internal, message: text}} = quietly(run)
        assert text =~ "stub #{inspect(own)}, program qa: " and text =~ expected
      end

      Stub.expect(own, "qa", fn _ -> Process.exit(self(), :kill) end)
      assert {:error, %Error{type: :internal, message: text}} = run.()
      assert text =~ "the answer's process ended: :killed"
    end

    test "that the stub does not have names the program and what to do" do
      own = start()

      for module <- [Bridge, Pool] do
        assert {:error, error} = quietly(fn -> module.call(own, :execute_program, run()) end)
        assert error =~ "Program not found: qa: the stub #{inspect(own)} has no answer for it"
        assert error =~ "Give it one with Stub.expect/3, Stub.stub/3 or the option :answers"
      end
    end
  end

  describe "a stream" do
    test "has the chunks and statuses that the answer sends, while it runs" do
      test = self()

      Stub.expect(@stub, "qa", fn _inputs ->
        Stub.status("thinking")
        Stub.chunk("answer", "Par")
        send(test, {:waits, self()})
        receive do: (:go_on -> Stub.chunk("answer", "is"))
        {:ok, %{"answer" => "Paris"}}
      end)

      elements =
        for element <- Bridge.stream(@stub, run()) do
          if element == {:chunk, "answer", "Par"} do
            assert_receive {:waits, pid}
            send(pid, :go_on)
          end

          element
        end

      assert [
               {:status, "thinking"},
               {:chunk, "answer", "Par"},
               {:chunk, "answer", "is"},
               {:ok, result, %{}}
             ] =
               elements

      assert result == %{"answer" => "Paris"}
    end

    test "has each string of an answer as a chunk, in the signature's order, if it sends none" do
      own =
        start(
          programs: [
            %{id: "qa", signature: "q -> z, b: int, a", program_type: "chain_of_thought"}
          ]
        )

      Stub.expect(own, "qa", fn _ ->
        {:ok, %{"a" => "A", "b" => 1, "z" => "Z", "reasoning" => "R"}}
      end)

      assert [{:chunk, "reasoning", "R"}, {:chunk, "z", "Z"}, {:chunk, "a", "A"}, {:ok, _, _}] =
               Enum.to_list(Bridge.stream(own, run(%{q: "?"})))
    end

    test "that is halted ends the answer" do
      blocks("chunk")

      assert [{:chunk, "answer", "a"}] = Enum.take(Pool.stream(@stub, run()), 1)
      assert_ended()
    end
  end

  # An answer that sends a chunk, and its pid, and never ends.
  defp blocks(mark) do
    test = self()

    Stub.stub(@stub, "qa", fn _inputs ->
      send(test, {:answers, mark, self()})
      Stub.chunk("answer", "a")
      Process.sleep(:infinity)
    end)
  end

  defp assert_ended do
    assert_receive {:answers, _mark, pid}
    ref = Process.monitor(pid)
    assert_receive {:DOWN, ^ref, :process, ^pid, reason} when reason in [:killed, :noproc]
    Helpers.eventually(fn -> Bridge.get_status(@stub).pending == 0 end)
  end

  describe "a program's module" do
    @answer %{"team" => "billing", "urgent" => true, "why" => "It says so.", "reasoning" => "R"}

    test "may be answered with its struct, and have atoms as names of fields and tools" do
      own = start(programs: [Triage])

      Stub.expect(own, Triage, fn _inputs ->
        {:ok, "ticket 7"} = Stub.call_tool(:find, %{id: 7})
        Stub.chunk(:why, "So.")
        {:ok, %Triage{team: :support, urgent: false, why: "So."}}
      end)

      assert [{:chunk, :why, "So."}, {:ok, triage, _meta}] =
               Enum.to_list(Triage.stream(%{ticket: "?"}, server: own))

      assert triage == %Triage{team: :support, urgent: false, why: "So."}
    end

    test "that is declared has inputs and outputs that are checked" do
      own = start(programs: [Triage])
      Stub.stub(own, Triage, fn _ -> {:ok, Map.delete(@answer, "why")} end)

      assert {:error, %Error{type: :internal, message: text}} =
               quietly(fn -> Triage.run(%{ticket: "?"}, server: own) end)

      assert text =~ "outputs.why: missing; expected team, urgent, why"

      assert {:error, text} =
               Pool.call(own, :execute_program, run(%{tiket: "?"}, inspect(Triage)))

      assert text == "inputs.tiket: unknown field; inputs.ticket: missing; expected ticket"
      assert {:ok, %{"programs" => [id]}} = Bridge.call(own, :list_programs)
      assert id == inspect(Triage)
      assert {:ok, %{"programs_removed" => 1}} = Pool.call(own, :cleanup)
      assert {:ok, %{"programs" => []}} = Bridge.call(own, :list_programs)
    end

    test "runs under the id of its definition/0" do
      Stub.stub(@stub, "second", fn %{"question" => "q"} -> {:ok, %{answer: "a"}} end)
      assert {:ok, %Renamed{answer: "a"}} = Renamed.run([question: "q"], server: @stub)

      assert {:ok, %Renamed{answer: "a"}, _meta} =
               [question: "q"] |> Renamed.stream(server: @stub) |> Enum.to_list() |> List.last()

      assert {:error, %Error{type: :invalid_request, message: message}} =
               Raising.run([question: "q"], server: @stub)

      assert message =~ "its definition/0 raised RuntimeError"
      assert [error: %Error{}] = Enum.to_list(Raising.stream([question: "q"], server: @stub))
    end
  end

  describe "a caller that gives up ends the answer:" do
    test "its timeout, in a call and a pool's stream; the stub's own, in a call and a cast" do
      blocks("timeout")
      assert {:error, :timeout} = Bridge.call(@stub, :execute_program, run(), 300)
      assert_ended()
      elements = Enum.to_list(Pool.stream(@stub, run(), timeout: 300))
      assert {:error, %Error{type: :timeout}} = List.last(elements)
      assert_ended()
      own = start(default_timeout: 50, answers: fn _, _ -> Process.sleep(:infinity) end)
      assert {:error, :timeout} = Pool.call(own, :execute_program, run())
      assert :ok = Bridge.cast(own, :execute_program, run())
      Helpers.eventually(fn -> Bridge.get_status(own).pending == 0 end)
    end

    test "its death" do
      blocks("death")

      for fun <- [
            fn -> call(%{}, timeout: :infinity) end,
            fn -> Pool.request(@stub, :execute_program, run(), tools: %{a: fn _ -> 1 end}) end
          ] do
        pid = spawn(fun)
        assert_receive {:answers, "death", answerer}
        send(self(), {:answers, "death", answerer})
        Process.exit(pid, :kill)
        assert_ended()
      end
    end
  end

  test "a stub that ends leaves its callers with an error, and nothing behind" do
    name = Module.concat(__MODULE__, "Ends")
    start_supervised!({Stub, name: name, answers: fn _, _ -> Process.sleep(:infinity) end})
    call = Task.async(fn -> Bridge.call(name, :execute_program, run()) end)
    Helpers.eventually(fn -> Bridge.get_status(name).pending == 1 end)
    stop_supervised!(name)
    assert {:error, :bridge_not_running} = Task.await(call)
    assert {:error, :bridge_not_running} = Pool.call(name, :ping)
    assert %{state: :failed} = Bridge.get_status(name)
    # Its name is free.
    start_supervised!({Stub, name: name})
    assert {:ok, %{"status" => "ok"}} = Pool.call(name, :ping)
  end

  defp start(opts \\ []) do
    name = Module.concat(__MODULE__, "S#{System.unique_integer([:positive])}")
    start_supervised!({Stub, [name: name] ++ opts})
    name
  end

  describe "wrong use is named:" do
    test "options" do
      for {opts, expected} <- [
            {[], ":name: expected that of your Bridge or Pool"},
            {[name: X, answer: 1], "unknown option :answer, did you mean :answers?"},
            {[name: X, answers: fn _ -> 1 end],
             ":answers: expected a function of a program's id and its inputs"},
            {[name: X, programs: [1]], ":programs: entry 1: expected a map or keyword list"},
            {[name: X, default_timeout: 0], ":default_timeout: expected 1 to"}
          ] do
        assert {:error, %ArgumentError{message: text}} = Stub.start_link(opts)
        assert text =~ expected
      end

      assert {:error, {:already_started, _pid}} = Stub.start_link(name: @stub)
    end

    test "what is not a stub, or not a program" do
      for other <- [:nobody, self(), __MODULE__] do
        assert_raise ArgumentError, ~r/is not a stub that runs/, fn ->
          Stub.expect(other, "qa", answer(1))
        end
      end

      assert_raise ArgumentError, ~r/expected a program's id or module, got 1/, fn ->
        Stub.expect(@stub, 1, answer(1))
      end
    end
  end
end
