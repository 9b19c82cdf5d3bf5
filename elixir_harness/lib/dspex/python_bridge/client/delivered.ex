defmodule DSPex.PythonBridge.Client.Delivered do
  @moduledoc false
  # What a caller has been given of a run, and how far the present peer has come in it. After the death of a peer the next one
  # begins anew: what the caller has already is left out. Where the text of a field differs, the field is reset, and comes
  # from its beginning.
  #
  # A mark identifies each text of a field: how many of the `attempts` came before it, and how many resets. Each of these
  # makes all chunks up to then void.

  @asking_again "asking again"

  defstruct told?: false,
            texts: %{},
            shown: %{},
            sent: %{},
            round: 0,
            resets: %{},
            statuses: [],
            statuses_left: [],
            items: MapSet.new()

  @typedoc """
  `told?`: whether the caller was given anything since the start of the peer's run. `texts`: what the caller has of each field.
  `shown`: the mark of the text that it was given last. `sent`: how many bytes of each text the peer has sent, `round`,
  `resets`: its marks. `statuses`: those that it has sent, the newest first; `statuses_left`: those that earlier ones have sent.
  """
  @type t :: %__MODULE__{
          told?: boolean(),
          texts: %{{field :: String.t(), mark()} => String.t()},
          shown: %{String.t() => mark()},
          sent: %{{String.t(), mark()} => non_neg_integer()},
          round: non_neg_integer(),
          resets: %{String.t() => pos_integer()},
          statuses: [String.t()],
          statuses_left: [String.t()],
          items: MapSet.t(non_neg_integer())
        }
  @typep mark :: {round :: non_neg_integer(), resets :: non_neg_integer()}

  @doc "What the caller is given for a chunk: nothing, the chunk or its end, or the field from its beginning."
  @spec take(t(), map()) :: {[map()], t()}
  def take(%__MODULE__{} = delivered, chunk) do
    case new(delivered, chunk) do
      {[], delivered} -> {[], delivered}
      {chunks, delivered} -> {chunks, %{delivered | told?: true}}
    end
  end

  @doc "The run begins anew at another peer."
  @spec restarted(t()) :: {[map()], t()}
  def restarted(%__MODULE__{} = delivered) do
    statuses = Enum.reverse(delivered.statuses, delivered.statuses_left)
    anew = %{delivered | told?: false, sent: %{}, round: 0, resets: %{}}
    anew = %{anew | statuses: [], statuses_left: statuses}
    {if(delivered.told?, do: [%{"status" => "restarted"}], else: []), anew}
  end

  @doc "What the caller is given before the result: fields whose text ended earlier than at an earlier peer."
  @spec rest(t()) :: [map()]
  def rest(%__MODULE__{} = delivered) do
    for {field, shown} <- delivered.shown,
        place = {field, mark(delivered, field)},
        sent = Map.get(delivered.sent, place, 0),
        text = Map.get(delivered.texts, place, ""),
        place != {field, shown} or sent < byte_size(text),
        chunk <- anew(field, binary_part(text, 0, sent), %{"field" => field}),
        do: chunk
  end

  defp new(delivered, %{"field" => field, "chunk" => text} = chunk) when is_binary(text) do
    place = {field, mark(delivered, field)}
    before = Map.get(delivered.texts, place, "")
    sent = Map.get(delivered.sent, place, 0)
    same = binary_part(before, 0, sent)
    left = binary_part(before, sent, byte_size(before) - sent)

    cond do
      # More than the caller has of it, or no more.
      String.starts_with?(left, text) and left != "" ->
        {[], put_in(delivered.sent[place], sent + byte_size(text))}

      String.starts_with?(text, left) and last?(delivered, place) ->
        more = binary_part(text, byte_size(left), byte_size(text) - byte_size(left))
        {[%{chunk | "chunk" => more}], show(delivered, place, before <> more)}

      true ->
        texts = Map.reject(delivered.texts, fn {{other, _mark}, _text} -> other == field end)
        whole = same <> text
        {anew(field, whole, chunk), show(%{delivered | texts: texts}, place, whole)}
    end
  end

  defp new(delivered, %{"field" => field, "reset" => true} = chunk) do
    delivered = update_in(delivered.resets[field], &((&1 || 0) + 1))
    place = {field, mark(delivered, field)}

    if is_map_key(delivered.texts, place),
      do: {[], delivered},
      else: {[chunk], show(delivered, place, "")}
  end

  defp new(delivered, %{"status" => text} = chunk) do
    delivered = %{delivered | statuses: [text | delivered.statuses]} |> voided(text)

    case delivered.statuses_left do
      [^text | left] -> {[], %{delivered | statuses_left: left}}
      _others -> {[chunk], %{delivered | statuses_left: []}}
    end
  end

  defp new(delivered, %{"index" => index} = item) do
    if index in delivered.items,
      do: {[], delivered},
      else: {[item], %{delivered | items: MapSet.put(delivered.items, index)}}
  end

  # From a later version of the peer, or of an optimization.
  defp new(delivered, chunk), do: {[chunk], delivered}

  defp voided(delivered, @asking_again <> _error),
    do: %{delivered | round: delivered.round + 1, resets: %{}}

  defp voided(delivered, _status), do: delivered

  defp mark(delivered, field), do: {delivered.round, Map.get(delivered.resets, field, 0)}

  defp last?(delivered, {field, mark}), do: Map.get(delivered.shown, field, mark) <= mark

  defp show(delivered, {field, mark} = place, text) do
    %{
      delivered
      | texts: Map.put(delivered.texts, place, text),
        sent: Map.put(delivered.sent, place, byte_size(text)),
        shown: Map.put(delivered.shown, field, mark)
    }
  end

  defp anew(field, "", _chunk), do: [%{"field" => field, "reset" => true}]
  defp anew(field, text, chunk), do: anew(field, "", chunk) ++ [Map.put(chunk, "chunk", text)]
end
