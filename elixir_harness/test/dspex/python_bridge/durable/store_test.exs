defmodule DSPex.PythonBridge.Durable.StoreTest do
  @moduledoc "What stores promise, and what durable runs do with stores that break their promises."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Durable, Error, Stub}
  alias DSPex.PythonBridge.Durable.{FileStore, MemoryStore, Run, Store}
  alias DSPex.Test.StoreContract

  # The shortest lease.
  @lease 1_000
  @long 60_000

  setup context do
    dir = Path.join(System.tmp_dir!(), "store-#{System.pid()}-#{:erlang.phash2(context.test)}")
    on_exit(fn -> File.rm_rf!(dir) end)
    %{dir: dir}
  end

  defmodule Broken do
    @moduledoc "A store whose functions do what the test says, and else what the one in memory does."
    @behaviour Store

    for {name, arity} <- Store.behaviour_info(:callbacks) do
      args = Macro.generate_arguments(arity - 1, __MODULE__)
      @impl Store
      def unquote(name)({agent, bad}, unquote_splicing(args)) do
        if fun = bad[unquote(name)],
          do: fun.(unquote(args)),
          else: apply(MemoryStore, unquote(name), [agent | unquote(args)])
      end
    end
  end

  for kind <- [:file, :memory] do
    test "a store (#{kind}) gives a run to one owner at a time, and keeps what that adds", %{
      dir: dir
    } do
      case unquote(kind) do
        :file -> StoreContract.check(FileStore, dir)
        :memory -> StoreContract.check(MemoryStore, start_supervised!({MemoryStore, []}))
      end
    end
  end

  describe "the file store" do
    test "loses at most the last record of a file that was torn", %{dir: dir} do
      :ok = FileStore.claim(dir, "r", "one", @long)
      for record <- ["first", "second", ""], do: :ok = FileStore.append(dir, "r", "one", record)
      [file] = Path.wildcard("#{dir}/*/records")
      whole = File.read!(file)

      for size <- 0..byte_size(whole) do
        File.write!(file, binary_part(whole, 0, size))
        assert {:ok, left} = FileStore.read(dir, "r")
        lines = whole |> binary_part(0, size) |> String.split("\n") |> length()
        assert left == Enum.take(["first", "second", ""], lines - 1)

        # The next owner goes on after what is whole.
        :ok = FileStore.finish(dir, "r", "one", "{}")
        :ok = FileStore.claim(dir, "r", "two", @long)
        :ok = FileStore.append(dir, "r", "two", "next")
        assert {:ok, now} = FileStore.read(dir, "r")
        assert now == left ++ ["next"]
        :ok = FileStore.finish(dir, "r", "two", "{}")
        :ok = FileStore.claim(dir, "r", "one", @long)
      end
    end

    test "tells which record is damaged, and erases the run all the same", %{dir: dir} do
      store = {FileStore, dir}
      :ok = FileStore.claim(dir, "r", "one", @long)

      for record <- ["first", "second", "third"],
          do: :ok = FileStore.append(dir, "r", "one", record)

      [file] = Path.wildcard("#{dir}/*/records")
      File.write!(file, file |> File.read!() |> String.replace("second", "secomd"))
      :ok = FileStore.finish(dir, "r", "one", "garbage")
      assert {:error, "record 2 is damaged"} = FileStore.read(dir, "r")
      assert {:error, %Error{message: text}} = Durable.resume(:nobody, "r", store: store)
      assert text =~ "record 2 is damaged"
      File.mkdir_p!(Path.join(dir, "no run's"))
      File.write!(Path.join(dir, "file"), "")
      assert {:ok, [%Run{id: "r", state: :unreadable}]} = Durable.list(store: store)
      assert :ok = Durable.delete("r", store: store)
      assert {:ok, []} = Durable.list(store: store)
    end

    test "takes ids that are no names of files, and no longer ones than these have", %{dir: dir} do
      for id <- ["../../etc/passwd", "a/b", <<0>>, ".", String.duplicate("é", 90)] do
        assert :ok = FileStore.claim(dir, id, "one", @long)
        assert {:ok, listed} = FileStore.list(dir)
        assert List.keymember?(listed, id, 0)
      end

      assert {:error, text} = FileStore.claim(dir, String.duplicate("a", 181), "one", @long)
      assert text =~ "180 bytes"
      assert Path.wildcard("#{dir}/*/claim.1") |> length() == 5
    end

    test "is readable by its user alone", %{dir: dir} do
      :ok = FileStore.claim(dir, "r", "one", @long)
      [folder] = Path.wildcard("#{dir}/*")
      assert Bitwise.band(File.stat!(folder).mode, 0o777) == 0o700
    end

    test "gives a run to another owner once the lease is over", %{dir: dir} do
      :ok = FileStore.claim(dir, "r", "one", @lease)
      assert {:error, :claimed} = FileStore.claim(dir, "r", "two", @lease)
      # As if it had passed.
      [claim] = Path.wildcard("#{dir}/*/claim.1")
      File.touch!(claim, System.os_time(:second))
      assert :ok = FileStore.claim(dir, "r", "two", @lease)
      assert {:error, :claimed} = FileStore.append(dir, "r", "one", "late")
      assert {:error, :claimed} = FileStore.claim(dir, "r", "one", @lease)
    end
  end

  describe "a run" do
    setup do
      test = self()
      name = :"stub-#{System.unique_integer([:positive])}"

      answers = fn "agent", _inputs ->
        {:ok, %{"answer" => inspect(Stub.call_tool("do", %{"what" => "a"}))}}
      end

      start_supervised!({Stub, name: name, answers: answers})
      memory = start_supervised!({MemoryStore, []})
      tools = %{do: fn _args -> send(test, :does) && "done" end}
      args = %{program_id: "agent", inputs: %{}}

      run = fn store, opts ->
        Durable.run(name, args, opts ++ [id: "r", lease: @lease, store: store, tools: tools])
      end

      %{run: run, memory: memory}
    end

    test "ends, with an error that says why, if its store breaks; no tool is called without its record",
         %{run: run, memory: memory} do
      bad = [
        raise: fn _args -> raise "secret" end,
        throw: fn _args -> throw(%{secret: 1}) end,
        exit: fn _args -> exit({:noproc, "secret"}) end,
        kill: fn _args -> Process.exit(self(), :kill) end,
        garbage: fn _args -> "secret" end,
        error: fn _args -> {:error, {:eacces, "secret"}} end
      ]

      for callback <- [:claim, :read, :append], {_name, fun} <- bad do
        assert {:error, %Error{type: type, message: text}} =
                 run.({Broken, {memory, %{callback => fun}}}, [])

        assert type == :internal
        assert text =~ "the store's #{callback}"
        refute text =~ "secret"
        refute_received :does
      end

      refusing = fn _args -> {:error, :enospc} end
      assert {:error, %Error{message: text}} = run.({Broken, {memory, %{append: refusing}}}, [])
      assert text =~ "append failed: :enospc"
    end

    test "ends before the tool is called if the disk is full by then", %{run: run, memory: memory} do
      # The arguments are stored, and the tool's beginning is not.
      append = fn [_id, _owner, record] = args ->
        if record =~ "began",
          do: {:error, :enospc},
          else: apply(MemoryStore, :append, [memory | args])
      end

      assert {:error, %Error{type: :cancelled, message: text}} =
               run.({Broken, {memory, %{append: append}}}, [])

      assert text =~ ":enospc"
      refute_received :does
      assert {:ok, %{"answer" => _}, _} = run.({MemoryStore, memory}, [])
      assert_received :does
    end

    test "waits for its store no longer than the lease", %{run: run, memory: memory} do
      hangs = fn _args -> Process.sleep(:infinity) end

      assert {:error, %Error{message: text}} =
               run.({Broken, {memory, %{append: hangs}}}, timeout: :infinity)

      assert text =~ "append did not return within #{@lease} ms"
      assert {:ok, _, _} = run.({Broken, {memory, %{finish: hangs}}}, [])
    end

    test "ends once another owner has it", %{run: run, memory: memory} do
      test = self()
      claims = :counters.new(1, [])

      # The first extension finds another owner.
      claim = fn [_id, _owner, _lease] = args ->
        :counters.add(claims, 1, 1)

        if :counters.get(claims, 1) > 1,
          do: send(test, :refused) && {:error, :claimed},
          else: apply(MemoryStore, :claim, [memory | args])
      end

      waits = fn _args ->
        send(test, {:at_work, self()})
        receive do: (:go_on -> "done")
      end

      store = {Broken, {memory, %{claim: claim}}}
      task = Task.async(fn -> run.(store, tools: %{do: waits}) end)
      assert_receive {:at_work, tool}, 5_000
      assert_receive :refused, 5_000
      eventually(fn -> :counters.get(claims, 1) > 1 end)
      send(tool, :go_on)
      assert {:error, %Error{type: :cancelled, message: text}} = Task.await(task)
      assert text =~ "another process has claimed it"
    end
  end
end
