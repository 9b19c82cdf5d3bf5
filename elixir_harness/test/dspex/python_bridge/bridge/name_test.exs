defmodule DSPex.PythonBridge.Bridge.NameTest do
  @moduledoc """
  A bridge that ends gives its name back before anything else: tests that each start one under the default name, linked to
  the test's process, follow one another.
  """

  # The default name and the application's configuration.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Bridge

  describe "each with a bridge of its own, linked to the test:" do
    setup do
      put_config(:python_bridge, python_executable: python(), lm: "offline/echo")
      {:ok, _} = Bridge.start_link()
      :ok
    end

    for n <- 1..20 do
      if n > 1, do: @tag(:slow)

      test "a ping (#{n})" do
        assert {:ok, %{"status" => "ok", "timestamp" => at}} = Bridge.call(:ping, %{})
        assert is_number(at)
      end

      if n > 1, do: @tag(:slow)

      test "a program, and a run of it (#{n})" do
        inputs = [%{name: "question", type: "str"}]
        signature = %{inputs: inputs, outputs: [%{name: "answer", type: "str"}]}
        args = %{id: "test_program", signature: signature}

        assert {:ok, %{"program_id" => "test_program", "status" => "created"}} =
                 Bridge.call(:create_program, args)

        args = %{program_id: "test_program", inputs: %{question: "What is 2+2?"}}
        assert {:ok, %{"answer" => _}} = Bridge.call(:execute_program, args)
      end

      if n > 1, do: @tag(:slow)

      test "an unknown program (#{n})" do
        args = %{program_id: "nonexistent", inputs: %{question: "test"}}
        assert {:error, text} = Bridge.call(:execute_program, args)
        assert text =~ "Program not found"
      end

      if n > 1, do: @tag(:slow)

      test "a timeout of 1 ms (#{n})" do
        case Bridge.call(:ping, %{}, 1) do
          {:ok, _pong} -> :ok
          {:error, reason} -> assert reason == :timeout
        end
      end

      if n > 1, do: @tag(:slow)

      test "ten pings at once (#{n})" do
        tasks = for n <- 1..10, do: Task.async(fn -> Bridge.call(:ping, %{request_id: n}) end)
        # Python starts meanwhile.
        for answer <- Task.await_many(tasks, 30_000),
            do: assert({:ok, %{"status" => "ok"}} = answer)
      end
    end
  end

  test "a bridge whose starter lives keeps its name" do
    put_config(:python_bridge, fake_opts("echo") |> Keyword.delete(:name))
    {:ok, bridge} = Bridge.start_link()
    {us, result} = :timer.tc(fn -> Bridge.start_link() end)
    assert result == {:error, {:already_started, bridge}}
    assert us < 500_000
  end

  test "the next one starts as soon as the process that had started one is gone, 200 times" do
    put_config(:python_bridge, fake_opts("echo") |> Keyword.delete(:name))

    for _ <- 1..200 do
      {pid, monitor} = spawn_monitor(fn -> {:ok, _} = Bridge.start_link() end)
      assert_receive {:DOWN, ^monitor, :process, ^pid, :normal}
    end
  end
end
