defmodule Mix.DSPex.StateFileTest do
  @moduledoc "The file of a state: what may be replaced, and what is as it was afterwards."

  use ExUnit.Case, async: true

  import Bitwise
  alias Mix.DSPex.StateFile

  @moduletag :tmp_dir

  defp mode(path), do: File.stat!(path).mode &&& 0o777

  # Whatever begins with a dot, too.
  defp files(dir), do: Enum.sort(File.ls!(dir))

  test "a new file, and one that is there, whose permissions stay", %{tmp_dir: dir} do
    path = Path.join(dir, "state.json")

    for before <- [nil, 0o600, 0o640, 0o444] do
      if before, do: File.chmod!(path, before)
      assert :ok = StateFile.check(path)
      assert :ok = StateFile.write(path, ["new", "\n"])
      assert File.read!(path) == "new\n"
      if before, do: assert(mode(path) == before)
    end

    assert files(dir) == ["state.json"]
  end

  test "a check leaves no file, and changes none", %{tmp_dir: dir} do
    assert :ok = StateFile.check(Path.join(dir, "new.json"))
    assert files(dir) == []
  end

  test "the owner stays, when root writes", %{tmp_dir: dir} do
    path = Path.join(dir, "state.json")
    File.write!(path, "mine")

    if File.chown(path, 12_345) == :ok do
      assert :ok = StateFile.write(path, "new")
      assert %{uid: 12_345} = File.stat!(path)
    end
  end

  test "a link stays, and what it leads to is replaced", %{tmp_dir: dir} do
    File.mkdir!(Path.join(dir, "real"))
    File.mkdir!(Path.join(dir, "links"))
    target = Path.join(dir, "real/state.json")
    File.ln_s!("../real/state.json", Path.join(dir, "links/one"))
    File.ln_s!("one", link = Path.join(dir, "links/two"))

    for before <- [nil, 0o600] do
      if before, do: File.chmod!(target, before)
      assert :ok = StateFile.check(link)
      assert :ok = StateFile.write(link, "new #{before}")
      assert File.read_link!(link) == "one"
      assert File.read!(target) == "new #{before}"
      if before, do: assert(mode(target) == before)
    end

    assert files(Path.join(dir, "links")) == ["one", "two"]
    assert files(Path.join(dir, "real")) == ["state.json"]
  end

  test "what is not a regular file, or cannot be written, is refused, and stays", %{tmp_dir: dir} do
    fifo = Path.join(dir, "fifo")
    {_, 0} = System.cmd("mkfifo", [fifo])
    File.ln_s!("fifo", Path.join(dir, "to_fifo"))
    File.ln_s!("loop", Path.join(dir, "loop"))
    File.mkdir!(Path.join(dir, "folder"))

    for {path, text} <- [
          {"", "--out : expected the path of a file"},
          {Path.join(dir, "folder"), "it is a folder"},
          {fifo, "it is not a regular file"},
          {Path.join(dir, "to_fifo"), "it is not a regular file"},
          {"/dev/null", "it is not a regular file"},
          {Path.join(dir, "loop"), "too many levels of symbolic links"},
          {Path.join(dir, "none/state.json"), "no such file or directory"},
          {Path.join(fifo, "state.json"), "not a directory"},
          {Path.join(dir, String.duplicate("a", 250)), "file name too long"}
        ] do
      assert {:error, refusal} = StateFile.check(path)
      assert refusal =~ text
      assert StateFile.write(path, "new") == {:error, refusal}
    end

    assert {:ok, %{type: :other}} = File.lstat(fifo)
    assert files(dir) == ["fifo", "folder", "loop", "to_fifo"]
  end

  test "what a killed process of the same id has left is in nobody's way", %{tmp_dir: dir} do
    path = Path.join(dir, "state.json")
    File.write!("#{path}.#{System.pid()}.part", "half")
    assert :ok = StateFile.check(path)
    assert :ok = StateFile.write(path, "new")
    assert files(dir) == ["state.json"]
  end

  test "the file is synced before it gets its name", %{tmp_dir: dir} do
    path = Path.join(dir, "state.json")
    patterns = [{:file, :sync, 1}, {:file, :rename, 2}]
    for pattern <- patterns, do: :erlang.trace_pattern(pattern, true, [:global])

    task =
      Task.async(fn ->
        receive do
          :go -> StateFile.write(path, "new")
        end
      end)

    :erlang.trace(task.pid, true, [:call])
    send(task.pid, :go)
    assert Task.await(task) == :ok
    for pattern <- patterns, do: :erlang.trace_pattern(pattern, false, [:global])
    # Its messages come before this one.
    delivered = :erlang.trace_delivered(task.pid)
    assert_receive {:trace_delivered, _pid, ^delivered}
    assert calls() == [:sync, :rename, :sync]
  end

  defp calls do
    receive do
      {:trace, _pid, :call, {:file, name, _args}} -> [name | calls()]
    after
      0 -> []
    end
  end
end
