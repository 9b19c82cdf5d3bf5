defmodule Mix.DSPex.StateFileTest do
  @moduledoc "The file of `mix dspex.optimize --out`: what is refused, what replacing it keeps."

  use ExUnit.Case, async: true

  import Bitwise

  alias Mix.DSPex.StateFile

  @moduletag :tmp_dir

  defp open(path) do
    {:ok, file} = StateFile.new(path)
    file
  end

  defp entries(dir), do: dir |> File.ls!() |> Enum.sort()

  test "is made where there is none, with the usual permissions", %{tmp_dir: dir} do
    usual = Path.join(dir, "usual")
    File.write!(usual, "")
    path = Path.join(dir, "state.json")
    file = open(path)
    refute File.exists?(path)
    assert :ok = StateFile.write(file, ["{", "}"])
    assert File.read!(path) == "{}"
    assert File.stat!(path).mode == File.stat!(usual).mode
    assert entries(dir) == ["state.json", "usual"]
  end

  test "keeps its permissions", %{tmp_dir: dir} do
    path = Path.join(dir, "state.json")
    File.write!(path, "old")

    for mode <- [0o600, 0o640, 0o664] do
      File.chmod!(path, mode)
      assert :ok = StateFile.write(open(path), "new #{mode}")
      assert {File.read!(path), File.stat!(path).mode &&& 0o777} == {"new #{mode}", mode}
    end
  end

  test "a link is followed, also a relative one to a link to nothing yet", %{tmp_dir: dir} do
    File.mkdir!(Path.join(dir, "real"))
    target = Path.join(dir, "real/state.json")
    File.ln_s!("real/second", Path.join(dir, "first"))
    File.ln_s!("../real/state.json", Path.join(dir, "real/second"))

    for content <- ["one", "two"] do
      assert :ok = StateFile.write(open(Path.join(dir, "first")), content)
      assert File.read!(target) == content
    end

    assert {:ok, "real/second"} = File.read_link(Path.join(dir, "first"))
    assert {:ok, "../real/state.json"} = File.read_link(Path.join(dir, "real/second"))
    assert entries(Path.join(dir, "real")) == ["second", "state.json"]
  end

  test "a link out of a folder that is a link is resolved as the system does", %{tmp_dir: dir} do
    File.mkdir_p!(Path.join(dir, "a/b"))
    File.ln_s!("a/b", Path.join(dir, "alias"))
    File.ln_s!("../state.json", Path.join(dir, "a/b/out"))
    assert :ok = StateFile.write(open(Path.join(dir, "alias/out")), "here")
    assert File.read!(Path.join(dir, "a/state.json")) == "here"
  end

  test "what is no regular file, or cannot be one, is refused and stays", %{tmp_dir: dir} do
    fifo = Path.join(dir, "fifo")
    {_, 0} = System.cmd("mkfifo", [fifo])
    File.ln_s!(fifo, Path.join(dir, "to_fifo"))
    File.ln_s!("loop", Path.join(dir, "loop"))
    File.write!(Path.join(dir, "file"), "")
    before = entries(dir)

    for {path, text} <- [
          {"", "expected the name of a file"},
          {dir <> "/", "expected the name of a file"},
          {dir, "is a folder"},
          {fifo, "is not a regular file"},
          {Path.join(dir, "to_fifo"), "is not a regular file"},
          {"/dev/null", "is not a regular file"},
          {Path.join(dir, "loop"), "too many levels of symbolic links"},
          {Path.join(dir, "none/state.json"), "no such file or directory"},
          {Path.join(dir, "file/state.json"), "not a directory"},
          {Path.join(dir, String.duplicate("n", 300)), "file name too long"}
        ] do
      assert {:error, message} = StateFile.new(path)

      assert message == "--out #{path}: #{text}" or
               String.starts_with?(message, "--out #{path}: #{text}")
    end

    assert entries(dir) == before
    assert File.stat!(fifo).type == :other
  end

  test "a failure leaves the old file, and nothing next to it", %{tmp_dir: dir} do
    path = Path.join(dir, "state.json")
    file = open(path)
    # It has become a folder meanwhile.
    File.mkdir!(path)

    assert {:error, message} = StateFile.write(file, "new")
    assert message =~ "--out #{path}: is a folder"

    assert entries(dir) == ["state.json"]
    assert entries(path) == []

    File.rm_rf!(dir)
    assert {:error, "--out #{path}: no such file or directory"} == StateFile.write(file, "new")
  end

  test "what a killed run has left does not keep the next one from it", %{tmp_dir: dir} do
    path = Path.join(dir, "state.json")
    File.write!("#{path}.#{System.pid()}.part", "half")
    assert :ok = StateFile.write(open(path), "whole")
    assert File.read!(path) == "whole"
  end
end
