defmodule Mix.DSPex.Baseline do
  @moduledoc false
  # An earlier report of `mix dspex.eval --json`, and what has changed since. Examples are found in it by a hash of their
  # inputs, so that a dataset may grow and be sorted, and the file has no contents.

  alias DSPex.PythonBridge.Evaluate
  alias DSPex.PythonBridge.Evaluate.Examples
  alias DSPex.PythonBridge.Protocol.Payload

  @version 1
  # Of the hash, in hexadecimal digits.
  @id_length 16
  @worst 10
  # Differences of larger numbers may not be floats.
  @most 1.0e100

  @typedoc "The hash of an example's inputs; with a number for those whose inputs are there again."
  @type id :: String.t()
  @typedoc """
  `before`, `now`: the means of the examples that are in both, and `change` their difference. `worst`: the results with the
  largest loss, with their scores before.
  """
  @type change :: %{
          before: float(),
          now: float(),
          change: float(),
          shared: pos_integer(),
          new: non_neg_integer(),
          gone: non_neg_integer(),
          worse: non_neg_integer(),
          worst: [{id(), Evaluate.Result.item(), before :: float()}]
        }

  @doc "The version of the report's format."
  @spec version() :: pos_integer()
  def version, do: @version

  ## Which example is which

  @doc "The id of each example, or the text that names one whose inputs have no JSON form."
  @spec ids([Evaluate.example()]) :: {:ok, [id()]} | {:error, String.t()}
  def ids(examples) do
    examples
    |> Enum.with_index()
    |> Enum.reduce_while({[], %{}}, fn {example, index}, {ids, seen} ->
      {inputs, _expected} = Examples.pair(example)

      case hash(inputs) do
        {:ok, hash} ->
          seen = Map.update(seen, hash, 1, &(&1 + 1))
          id = if seen[hash] == 1, do: hash, else: "#{hash}-#{seen[hash]}"
          {:cont, {[id | ids], seen}}

        {:error, error} ->
          {:halt, {:error, ":dataset[#{index}]: #{error.message}"}}
      end
    end)
    |> case do
      {:error, text} -> {:error, text}
      {ids, _seen} -> {:ok, Enum.reverse(ids)}
    end
  end

  defp hash(inputs) do
    # Atoms and strings are the same on the wire.
    with {:ok, json} <- Payload.encode(inputs, "inputs"),
         {:ok, decoded} <- Payload.decode(IO.iodata_to_binary(json)) do
      digest = :crypto.hash(:sha256, sorted_json(decoded))
      {:ok, digest |> Base.encode16(case: :lower) |> binary_part(0, @id_length)}
    end
  end

  @doc "A term of decoded JSON as JSON that is always the same: with its keys sorted."
  @spec sorted_json(term()) :: iodata()
  def sorted_json(map) when is_map(map) do
    pairs = for {key, value} <- Enum.sort(map), do: [JSON.encode!(key), ":", sorted_json(value)]
    ["{", Enum.intersperse(pairs, ","), "}"]
  end

  def sorted_json(list) when is_list(list),
    do: ["[", Enum.intersperse(Enum.map(list, &sorted_json/1), ","), "]"]

  def sorted_json(other), do: JSON.encode!(other)

  ## Reading and comparing

  @doc "The scores of a baseline by id, or why the file is not one."
  @spec read(Path.t()) :: {:ok, %{id() => float()}} | {:error, String.t()}
  def read(path) do
    with {:ok, bytes} <- file(path),
         {:ok, decoded} <- decode(bytes),
         {:ok, results} <- results(decoded) do
      {:ok, results}
    else
      {:error, text} -> {:error, "--baseline #{path}: #{text}"}
    end
  end

  defp file(path) do
    case File.read(path) do
      {:ok, bytes} ->
        {:ok, bytes}

      {:error, reason} ->
        {:error, "#{:file.format_error(reason)}; mix dspex.eval --json makes one"}
    end
  end

  defp decode(bytes),
    do: with({:error, {_type, text}} <- Payload.decode(bytes), do: {:error, text})

  defp results(%{"version" => @version, "results" => results}) when is_list(results) do
    scores = Enum.map(results, &score/1)

    case Enum.find_index(scores, &(&1 == nil)) do
      nil ->
        {:ok, Map.new(scores)}

      index ->
        {:error, "results[#{index}]: expected an object with id, a string, and score, a number"}
    end
  end

  defp results(%{"version" => version}) when version != @version do
    shown = if is_integer(version), do: "#{version}", else: "unknown"

    {:error,
     "its version is #{shown}, and this :dspex reads version #{@version}: make it anew with mix dspex.eval --json"}
  end

  defp results(_other), do: {:error, "expected the output of mix dspex.eval --json"}

  defp score(%{"id" => id, "score" => score})
       when is_binary(id) and is_number(score) and abs(score) < @most,
       do: {id, score / 1}

  defp score(_other), do: nil

  @doc "What has changed since the baseline; nil if none of its examples is there."
  @spec compare(%{id() => float()}, [{id(), Evaluate.Result.item()}]) :: change() | nil
  def compare(scores, results) do
    shared = for {id, item} <- results, before = scores[id], do: {id, item, before}

    if shared != [] do
      count = length(shared)
      # In the same order, so that equal scores have equal means.
      before = mean(for {_id, _item, before} <- shared, do: before)
      now = mean(for {_id, item, _before} <- shared, do: item.score)
      worse = Enum.filter(shared, fn {_id, item, before} -> item.score < before end)
      worst = Enum.sort_by(worse, fn {_id, item, before} -> {item.score - before, item.index} end)

      %{
        before: before,
        now: now,
        change: now - before,
        shared: count,
        new: length(results) - count,
        gone: map_size(scores) - count,
        worse: length(worse),
        worst: Enum.take(worst, @worst)
      }
    end
  end

  # Each by itself: the sum may be more than a float holds.
  defp mean(scores) do
    count = length(scores)
    scores |> Enum.map(&(&1 / count)) |> Enum.sum()
  end
end
