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

  @doc "Prints the LM calls."
  @spec print(source()) :: :ok
  def print(source), do: IO.write(format(source))

  @doc ~S"""
  The same as text. What has no history says so.

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
  def format({:ok, _result, meta}), do: format(meta)
  def format({:error, error}), do: format(error)
  def format(%Error{meta: meta}), do: format(meta)
  def format(%{"history" => history}), do: format(history)
  def format([]), do: "no LM calls\n"
  def format(entries) when is_list(entries), do: Enum.map(entries, &entry/1)
  def format(_none), do: "no history: the call needs history: true\n"

  defp entry(%{"omitted" => n}), do: "\n[#{n} LM calls omitted]\n"

  defp entry(entry) do
    [
      ["\n[", entry |> facts() |> Enum.reject(&is_nil/1) |> Enum.join(", "), "]\n\n"],
      messages(entry["messages"]),
      outputs(entry["outputs"] || []),
      if(entry["error"], do: ["Error:\n", text(entry["error"]), "\n"], else: [])
    ]
  end

  defp facts(entry) do
    usage = entry["usage"] || %{}
    sent = usage["prompt_tokens"]

    [
      shown(entry["model"]),
      if(sent, do: "#{sent} + #{usage["completion_tokens"]} tokens"),
      if(ms = entry["duration_ms"], do: "#{round(ms)} ms"),
      if(entry["cached"], do: "cached"),
      if(entry["finish_reason"] not in [nil, "stop"],
        do: "finish: #{shown(entry["finish_reason"])}"
      )
    ]
  end

  ## A prompt and its response

  defp messages(nil), do: "(messages left out)\n\n"

  defp messages(messages) do
    for %{"role" => role} = message <- messages do
      head = [role |> shown() |> String.capitalize(), " message:\n"]
      [head, text(message["content"]), tool_calls(message["tool_calls"] || []), "\n"]
    end
  end

  # Of several completions DSPy uses the first.
  defp outputs([]), do: []
  defp outputs([only]), do: [output(only), "\n"]

  defp outputs([first | others]),
    do: [output(first), "(and #{length(others)} more completions)\n\n"]

  defp output(%{} = output) do
    response = if output["text"] in [nil, ""], do: [], else: output(output["text"])
    [response, tool_calls(output["tool_calls"] || [])]
  end

  defp output(text), do: ["Response:\n", text(text)]

  defp tool_calls([]), do: []
  defp tool_calls(calls), do: ["Tool calls:\n" | Enum.map(calls, &tool_call/1)]

  defp tool_call(call) do
    function = call["function"] || call
    text("#{function["name"]}: #{shown(function["arguments"] || call["args"])}")
  end

  ## Text

  defp text(parts) when is_list(parts), do: Enum.map(parts, &text(part(&1)))
  defp text(value), do: [value |> shown() |> String.trim(), "\n"]

  defp part(%{"type" => "text", "text" => text}), do: text
  defp part(%{"image_url" => %{"url" => "http" <> _ = url}}), do: "<image #{url}>"
  defp part(part), do: "<#{part["type"]}, #{byte_size(JSON.encode!(part))} characters>"

  # An LM, and whoever writes to it, must not control the terminal.
  defp shown(text) when is_binary(text) do
    text
    |> String.replace("\r\n", "\n")
    |> String.replace(~r/[\x{0}-\x{8}\x{B}-\x{1F}\x{7F}-\x{9F}]/u, fn <<char::utf8>> ->
      "\\x" <> Base.encode16(<<char>>)
    end)
  end

  defp shown(nil), do: ""
  defp shown(term), do: shown(JSON.encode!(term))
end
