defmodule Mix.DSPex.Baseline do
  @moduledoc false
  # An earlier output of `mix dspex.eval --json`, and what has changed since. Examples are found in it by a hash of their
  # inputs, so that a dataset may grow and be sorted, and the file has no contents.

  alias DSPex.PythonBridge.Evaluate
  alias DSPex.PythonBridge.Evaluate.Examples
  alias DSPex.PythonBridge.Protocol.Payload

  # That of the head of the report.
  @version 1
  # Of the hash, in hexadecimal digits.
  @id_length 16
  @worst 10

  @typedoc "The hash of an example's inputs; with a number for those whose inputs are there again."
  @type id :: String.t()
  @typedoc """
  `before`, `now`: the means of the examples that are in both, and `change` their difference; `shared`, `new`, `gone`, `worse`:
  numbers of examples. `worst`: the results with the largest loss, with their scores before.
  """
  @type change :: %{atom() => number() | [{id(), Evaluate.Result.item(), before :: number()}]}

  @doc "The id of each example. The text that names one whose inputs have no JSON form is raised."
  @spec ids([Evaluate.example()]) :: [id()]
  def ids(examples) do
    {ids, _seen} =
      examples
      |> Enum.with_index()
      |> Enum.map_reduce(%{}, fn {example, index}, seen ->
        hash = hash(example, index)
        count = Map.get(seen, hash, 0) + 1
        {if(count == 1, do: hash, else: "#{hash}-#{count}"), Map.put(seen, hash, count)}
      end)

    ids
  end

  defp hash(example, index) do
    {inputs, _expected} =
      Examples.pair(example) || Mix.raise(Examples.refusal(":dataset", index))

    # Atoms and strings are the same on the wire.
    case Payload.encode(inputs, "inputs") do
      {:ok, json} ->
        {:ok, decoded} = Payload.decode(IO.iodata_to_binary(json))
        digest = :crypto.hash(:sha256, sorted_json(decoded))
        digest |> Base.encode16(case: :lower) |> binary_part(0, @id_length)

      {:error, error} ->
        Mix.raise(":dataset[#{index}]: #{error.message}")
    end
  end

  @doc "A term as JSON that is always the same: with its keys sorted."
  @spec sorted_json(term()) :: iodata()
  def sorted_json(map) when is_map(map) do
    pairs = for {key, value} <- Enum.sort(map), do: [JSON.encode!(key), ":", sorted_json(value)]
    ["{", Enum.intersperse(pairs, ","), "}"]
  end

  def sorted_json(list) when is_list(list),
    do: ["[", Enum.intersperse(Enum.map(list, &sorted_json/1), ","), "]"]

  def sorted_json(other), do: JSON.encode!(other)

  @doc "The scores of a baseline by id; raises the reason why the file is not one."
  @spec read!(Path.t()) :: %{id() => number()}
  def read!(path) do
    with {:ok, bytes} <- File.read(path),
         {:ok, %{"version" => @version, "results" => [_ | _] = results}} <- JSON.decode(bytes),
         true <- Enum.all?(results, &match?(%{"id" => _, "score" => s} when is_number(s), &1)) do
      Map.new(results, &{&1["id"], &1["score"]})
    else
      {:error, reason} when is_atom(reason) ->
        text = :file.format_error(reason)
        Mix.raise("--baseline #{path}: #{text}; mix dspex.eval --json makes one")

      _other ->
        Mix.raise(
          "--baseline #{path}: expected the output of mix dspex.eval --json, version #{@version}"
        )
    end
  end

  @doc "What has changed since the baseline; nil if it has none of these examples."
  @spec compare(%{id() => number()}, [{id(), Evaluate.Result.item()}]) :: change() | nil
  def compare(scores, results) do
    shared = for {id, item} <- results, before = scores[id], do: {id, item, before}

    if shared != [] do
      count = length(shared)
      # In the same order, so that equal scores have equal means.
      before = Enum.sum_by(shared, fn {_id, _item, before} -> before end) / count
      now = Enum.sum_by(shared, fn {_id, item, _before} -> item.score end) / count
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
end
