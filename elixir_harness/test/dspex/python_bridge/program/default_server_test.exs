defmodule DSPex.ProgramDefaultServerTest do
  @moduledoc "Where a program runs if nobody says it: in the pool with its default name, if it runs, else in the bridge."

  # The default names are those of all.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Pool}

  defmodule Qa do
    @moduledoc false
    use DSPex.PythonBridge.Program, signature: "question -> answer"
  end

  test "the pool comes before the bridge, and a server that is given before both" do
    assert {:error, %Error{type: :bridge_not_running, message: message}} = Qa.run(question: "a")
    assert message == "the bridge DSPex.PythonBridge.Bridge is not running"

    start_supervised!({Bridge, real_opts(name: Bridge)})
    assert {:error, %Error{type: :program_not_found, message: message}} = Qa.run(question: "a")
    assert message == "Program not found: DSPex.ProgramDefaultServerTest.Qa"

    start_supervised!({Pool, real_opts(name: Pool, pool_size: 1, programs: [Qa])})
    assert {:ok, %Qa{answer: "echo: a"}} = Qa.run(question: "a")
    assert {:error, %Error{type: :program_not_found}} = Qa.run([question: "a"], server: Bridge)
  end
end
