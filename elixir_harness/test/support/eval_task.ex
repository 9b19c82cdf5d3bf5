defmodule DSPex.Test.EvalTask do
  @moduledoc "Runs `mix dspex.eval`, or another task, in this BEAM, with files of the test."

  import ExUnit.Assertions
  import ExUnit.CaptureIO

  alias Mix.Tasks.Dspex.Eval

  # Rome is right, Lima is not.
  @program ~S"""
  %{id: "capital", signature: "question -> answer", lm: %{model: "offline/script",
    answers: %{"Italy" => %{answer: "Rome"}, "Peru" => %{answer: "secret-answer"}, "*" => %{answer: "?"}}}}
  """
  @dataset ~S"""
  [{%{question: "Italy"}, %{answer: "Rome"}}, {%{question: "Peru"}, %{answer: "Lima"}}]
  """
  @metric "{:field, :answer, :exact_match}"

  @doc "The program that these files have by default."
  def program, do: @program

  @doc "A file of the task, with what is given in place of the usual."
  def file(dir, parts \\ []) do
    parts = Keyword.merge([program: @program, dataset: @dataset, metric: @metric], parts)

    source(
      dir,
      "[" <>
        Enum.map_join(parts, ", ", fn {key, code} -> "#{key}: (#{code})" end) <> "]"
    )
  end

  @doc "A file with this code."
  def source(dir, code) do
    path = Path.join(dir, "eval#{System.unique_integer([:positive])}.exs")
    File.write!(path, code)
    path
  end

  @doc "Its exit status, standard output, standard error, and the text with which Mix ends it."
  def run(args, task \\ Eval) do
    me = self()

    err =
      capture_io(:stderr, fn ->
        out = capture_io(fn -> send(me, {:ended, ended(task, args)}) end)
        send(me, {:out, out})
      end)

    assert_received {:ended, {status, text}}
    assert_received {:out, out}
    %{status: status, out: out, err: err, text: text}
  end

  defp ended(task, args) do
    task.run(args)
    {0, nil}
  rescue
    error in Mix.Error -> {error.mix, error.message}
  catch
    :exit, {:shutdown, status} -> {status, nil}
  end

  @doc "The same with --json, and the object."
  def json(args) do
    %{out: out} = run = run(["--json" | args])
    Map.put(run, :json, JSON.decode!(out))
  end

  @doc "A baseline of these scores, in the order of the dataset."
  def baseline(dir, path, scores) do
    %{json: %{"results" => results} = report} = json([path])

    results =
      Enum.zip_with(results, scores, fn result, score -> %{result | "score" => score} end)

    write(dir, JSON.encode!(%{report | "results" => results}))
  end

  @doc "A file with these bytes."
  def write(dir, bytes) do
    path = Path.join(dir, "base#{System.unique_integer([:positive])}.json")
    File.write!(path, bytes)
    path
  end
end
