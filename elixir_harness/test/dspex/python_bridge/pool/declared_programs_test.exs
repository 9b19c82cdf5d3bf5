defmodule DSPex.PythonBridge.Pool.DeclaredProgramsTest do
  @moduledoc "Declared programs of a pool: all peers have them, and each restarted one."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers
  import ExUnit.CaptureLog

  alias DSPex.PythonBridge.{Error, Pool}
  alias DSPex.Test.PoolProbe

  @moduletag :tmp_dir

  # Names of the test's own, so that the tests of this file may run concurrently with those of others.
  @pool __MODULE__.Pool
  @qa %{id: "qa", signature: "q -> a"}
  @triage [id: "triage", signature: "ticket -> team"]
  @both %{"qa" => "q -> a", "triage" => "ticket -> team"}

  defp start_who(opts) do
    opts = Keyword.merge([name: @pool, pool_size: 2], opts)
    start_supervised!({Pool, Keyword.merge(fake_opts("who"), opts)})
    all_up(@pool)
  end

  defp peers, do: Pool.status(@pool).peers
  defp programs, do: Enum.uniq(PoolProbe.programs(@pool))

  defp kill_bridge(name) do
    pid = Process.whereis(name)
    Process.exit(pid, :kill)
    eventually(fn -> Process.whereis(name) not in [pid, nil] end, 30_000)
  end

  test "all peers have them from the first call on, and when they are restarted" do
    start_who(programs: [@qa, @triage])
    assert programs() == [@both]
    for %{os_pid: os_pid} <- peers(), do: kill(os_pid)
    assert programs() == [@both]
    kill_bridge(hd(peers()).bridge)
    assert programs() == [@both]
    assert Pool.status(@pool).programs == %{failed: %{}}
  end

  describe "with the real peer" do
    test "wrong ones are in the status and the log, and their runs fail with the reason" do
      wrong = [
        %{id: "bad type", signature: %{inputs: [%{name: "q", type: "strng"}], outputs: []}},
        %{id: "no json", signature: {:q, :a}}
      ]

      log =
        capture_log(fn ->
          opts = [name: @pool, pool_size: 2, programs: [@qa | wrong]]
          start_supervised!({Pool, real_opts(opts)})
          assert {:ok, %{"a" => _}} = Pool.call(@pool, :execute_program, run("qa"), 60_000)
          # They are loaded behind the first call.
          eventually(fn -> map_size(Pool.status(@pool).programs.failed) == 2 end, 60_000)
        end)

      # Once for the pool; each peer says what it refuses.
      [_one] = Regex.scan(~r/program no json could not be loaded: args.signature: a tuple/, log)
      assert log =~ "program bad type could not be loaded: signature.inputs[0].type"
      %{programs: %{failed: failed}} = Pool.status(@pool)
      assert Enum.sort(Map.keys(failed)) == ["bad type", "no json"]

      for {id, reason} <- failed do
        assert {:error, text} = Pool.call(@pool, :execute_program, run(id), 60_000)
        assert text == reason
        assert text =~ ~r/program #{id} could not be loaded: (args\.)?signature/

        assert [error: %Error{type: :invalid_args, message: ^reason}] =
                 Enum.to_list(Pool.stream(@pool, run(id), timeout: 60_000))
      end

      assert {:ok, %{"programs" => ["bad type", "qa"], "missing" => []}} =
               eventually(
                 fn ->
                   with {:ok, %{"missing" => [_ | _]}} <- Pool.call(@pool, :list_programs),
                        do: nil
                 end,
                 60_000
               )
    end

    defp run(id), do: %{program_id: id, inputs: %{q: "?"}}
  end
end
