defmodule DSPex.PythonBridge.History do
  @moduledoc ~S"""
  Shows the LM calls of a run, as DSPy's `inspect_history` does: the messages of each prompt under their roles, and the
  response. The run has to be asked for them:

      result = Bridge.request(Bridge, :execute_program, args, history: true)
      History.print(result)

  An entry of `meta["history"]` is a map with string keys: `"model"`, `"messages"` (each with `"role"` and `"content"`),
  `"outputs"` (a list of strings, or of maps with `"text"` and `"tool_calls"`), `"finish_reason"`, `"usage"`,
  `"duration_ms"`, `"cached"`, `"error"`. Long histories are cut: `%{"omitted" => n}` stands for `n` LM calls, and
  `"messages"` is nil if there was no room for them.

  It has what the prompt had: do not write it to a log that others read.
  """

  alias DSPex.PythonBridge.Error

  @typedoc "What has a history: its entries, a `meta`, a result of `DSPex.PythonBridge.Bridge.request/4`, or its error."
  @type source ::
          [map()] | map() | {:ok, term(), map()} | {:error, Error.t()} | Error.t()

  @doc """
  Prints the LM calls, in colours if standard output is a terminal that has them (`IO.ANSI.enabled?/0`).
  """
  @spec print(source()) :: :ok
  def print(source), do: IO.write(format(source, IO.ANSI.enabled?()))

  @doc ~S"""
  The same as text, without colours. Any term gives a text: what has no history says so.

      iex> entry = %{
      ...>   "model" => "openai/gpt-4o-mini",
      ...>   "messages" => [%{"role" => "user", "content" => "Why?"}],
      ...>   "outputs" => ["Because."],
      ...>   "usage" => %{"prompt_tokens" => 12, "completion_tokens" => 3},
      ...>   "duration_ms" => 812.4,
      ...>   "cached" => false
      ...> }
      iex> text = DSPex.PythonBridge.History.format([entry])
      iex> IO.iodata_to_binary(text)
      "\n[openai/gpt-4o-mini, 12 + 3 tokens, 812 ms]\n\nUser message:\nWhy?\n\nResponse:\nBecause.\n\n"
  """
  @spec format(source()) :: iodata()
  def format(source), do: format(source, false)

  defp format(source, colours?) do
    case entries(source) do
      nil -> "no history: the call needs history: true\n"
      [] -> "no LM calls\n"
      entries -> entries |> Enum.map(&entry/1) |> IO.ANSI.format(colours?)
    end
  end

  ## The entries

  defp entries({:ok, _result, meta}), do: entries(meta)
  defp entries({:error, error}), do: entries(error)
  defp entries(%{__struct__: Error} = error), do: entries(Map.get(error, :meta))
  defp entries(%{"history" => history}), do: entries(history)
  defp entries(list) when is_list(list), do: if(List.improper?(list), do: [list], else: list)
  defp entries(_none), do: nil

  # As data for IO.ANSI.format/2, which takes atoms for colours.
  defp entry(%{"omitted" => n} = entry) when not is_map_key(entry, "messages"),
    do: ["\n", heading(:blue, "[#{shown(n)} LM calls omitted]"), "\n"]

  defp entry(entry) do
    [
      [
        "\n",
        heading(:blue, "[#{entry |> facts() |> Enum.reject(&is_nil/1) |> Enum.join(", ")}]"),
        "\n"
      ],
      messages(entry["messages"]),
      outputs(entry["outputs"] || []),
      if(entry["error"], do: [heading(:red, "Error:"), text(entry["error"]), "\n"], else: [])
    ]
  rescue
    # It is of another shape.
    _error -> ["\n", shown(inspect(entry)), "\n\n"]
  end

  defp facts(entry) do
    usage = entry["usage"] || %{}
    total = usage["total_tokens"]
    sent = usage["prompt_tokens"]

    [
      line(entry["model"] || "unknown model"),
      cond do
        sent -> "#{sent} + #{usage["completion_tokens"]} tokens"
        total -> "#{total} tokens"
        true -> nil
      end,
      if(ms = entry["duration_ms"], do: "#{round(ms)} ms"),
      if(entry["cached"], do: "cached"),
      if(entry["finish_reason"] not in [nil, "stop"],
        do: "finish: #{line(entry["finish_reason"])}"
      )
    ]
  end

  ## A prompt and its response

  defp messages(nil), do: "(messages left out)\n\n"

  defp messages(messages) do
    for message <- messages do
      role = line(message["role"] || "unknown")
      role = heading(:red, String.capitalize(role) <> " message:")
      [role, text(content(message["content"])), tool_calls(message["tool_calls"] || []), "\n"]
    end
  end

  defp content(parts) when is_list(parts), do: Enum.map_join(parts, "\n", &part/1)
  defp content(content), do: content

  defp part(%{"type" => "text", "text" => text}), do: shown(text)

  defp part(%{"image_url" => %{"url" => "data:" <> _data = url}}),
    do: "<image, data of #{byte_size(url)} characters>"

  defp part(%{"image_url" => %{"url" => url}}), do: "<image #{line(url)}>"

  defp part(%{"type" => type} = part),
    do: "<#{line(type)}, #{part |> Map.delete("type") |> shown() |> byte_size()} characters>"

  # Of several completions DSPy uses the first.
  defp outputs([]), do: []
  defp outputs([only]), do: [output(only), "\n"]

  defp outputs([first | others]),
    do: [output(first), heading(:red, "(and #{length(others)} more completions)"), "\n"]

  defp output(%{} = output) do
    response = if output["text"] in [nil, ""], do: [], else: output(output["text"])
    [response, tool_calls(output["tool_calls"] || [])]
  end

  defp output(text), do: [heading(:red, "Response:"), coloured(:green, text(text))]

  defp tool_calls([]), do: []
  defp tool_calls(calls), do: [heading(:red, "Tool calls:") | Enum.map(calls, &tool_call/1)]

  defp tool_call(call) do
    function = call["function"] || call
    args = function["arguments"] || call["args"]
    coloured(:green, text("#{line(function["name"] || "unknown")}: #{shown(args)}"))
  end

  ## Text

  defp heading(colour, text), do: coloured(colour, [text, "\n"])
  defp coloured(colour, text), do: [colour, text, :reset]

  defp text(value), do: [value |> shown() |> String.trim(), "\n"]

  # A value within a line.
  defp line(value), do: value |> shown() |> String.replace("\n", " ")

  # An LM, and whoever writes to it, must not control the terminal.
  defp shown(text) when is_binary(text) do
    text
    |> String.replace_invalid()
    |> String.replace("\r\n", "\n")
    |> String.replace(~r/[\x{0}-\x{8}\x{B}-\x{1F}\x{7F}-\x{9F}]/u, &escaped/1)
  end

  defp shown(nil), do: ""

  defp shown(term) do
    shown(JSON.encode!(term))
  catch
    _kind, _no_json -> term |> inspect() |> shown()
  end

  defp escaped(<<char::utf8>>), do: "\\x" <> Base.encode16(<<char>>)
end
