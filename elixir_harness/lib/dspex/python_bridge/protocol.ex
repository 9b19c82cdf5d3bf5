defmodule DSPex.PythonBridge.Protocol do
  @moduledoc """
  Encodes and decodes payloads: JSON in UTF-8, one object a frame. It needs no process and does no I/O; the port adds
  the 4-byte length of a frame (`{:packet, 4}`).

  The work is split so that the bridge's process reads few bytes: the caller encodes a request without its head
  (`encode_body/3`) and decodes its own reply (`decode_reply/1`); the bridge adds the head (`request_frame/3`) and reads
  the kind and id of a frame from its first bytes (`route/1`).
  """

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.Protocol.Payload

  # For each call.
  @compile {:inline, encode_command: 1, decode_success: 3}

  # The bridge gives no longer ids; the limit keeps `route/1` cheap for any bytes.
  @max_id_digits 18
  @commands ~w(ping create_program execute_program list_programs get_stats cleanup)a
  # Those of Python.
  @log_levels Map.new(~w(debug info warning error critical)a, &{Atom.to_string(&1), &1})

  @type id :: integer() | String.t()
  @type command :: atom() | String.t()
  @type reason ::
          {:invalid_json | :not_a_reply | :not_a_chunk | :not_a_tool_call | :not_a_log,
           String.t()}

  ## Requests

  @doc """
  The payload of a whole request. `id` is the first key; `timestamp` is the present time, UTC, ISO 8601.

  Raises `ArgumentError` for an id that is neither an integer nor a string, and for `args` without a JSON form.

      iex> payload = DSPex.PythonBridge.Protocol.encode_request(1, :ping, %{})
      iex> String.starts_with?(payload, ~s({"id":1,"command":"ping","args":{},"timestamp":"20))
      true
  """
  @spec encode_request(id(), command(), map()) :: binary()
  def encode_request(id, command, args) do
    with true <- is_integer(id) or is_binary(id),
         {:ok, id_json} <- Payload.encode(id, "id"),
         {:ok, body} <- encode_body(command, args) do
      time = DateTime.to_iso8601(DateTime.utc_now(:second))
      open = binary_part(body, 0, byte_size(body) - 1)
      IO.iodata_to_binary([~s({"id":), id_json, open, ~s(,"timestamp":"), time, ~s("})])
    else
      false -> raise ArgumentError, "id: expected an integer or a string"
      {:error, error} -> raise ArgumentError, error.message
    end
  end

  @doc """
  The part of a request after its id and deadline, for `request_frame/3`.

  Options: `meta: true` asks for `meta` in the reply, `history: true` for the LM calls in it, `lm_events: true` for
  these without contents, `stream: true` for chunks before the reply; `:traceparent` is a valid W3C trace context. The
  error names the value that has no JSON form.

      iex> {:ok, body} = DSPex.PythonBridge.Protocol.encode_body("ping", %{n: 1})
      iex> body
      ~s(,"command":"ping","args":{"n":1}})
      iex> {:error, error} = DSPex.PythonBridge.Protocol.encode_body(:ping, %{f: {1, 2}})
      iex> error.message
      "args.f: a tuple has no JSON form; a keyword list has to be written as a map"
  """
  @spec encode_body(command(), map(), keyword()) :: {:ok, binary()} | {:error, Error.t()}
  def encode_body(command, args, opts \\ []) do
    with {:ok, command_json} <- encode_command(command),
         true <- is_map(args) || {:error, Error.new(:invalid_args, "args: expected a map")},
         {:ok, args_json} <- Payload.encode(args, "args") do
      # One binary costs half as much as a list of parts.
      {:ok,
       <<",\"command\":", IO.iodata_to_binary(command_json)::binary, ",\"args\":",
         IO.iodata_to_binary(args_json)::binary, wishes(opts)::binary, "}">>}
    end
  end

  for command <- @commands do
    defp encode_command(unquote(command)), do: {:ok, unquote(~s("#{command}"))}
  end

  defp encode_command(command) do
    if name = Payload.string(command),
      do: Payload.encode(name, "command"),
      else: {:error, Error.new(:invalid_request, "command: expected an atom or a string")}
  end

  # The usual options first: they need no lookup.
  defp wishes([]), do: ""
  defp wishes(meta: true), do: ~s(,"meta":true)

  defp wishes(opts) do
    flags =
      for key <- [:meta, :history, :lm_events, :stream],
          opts[key],
          into: "",
          do: ~s(,"#{key}":true)

    if trace = opts[:traceparent],
      do: flags <> ~s(,"traceparent":) <> JSON.encode!(trace),
      else: flags
  end

  @doc """
  The payload of a request: its id, its deadline in milliseconds and the body of `encode_body/3`.

      iex> IO.iodata_to_binary(DSPex.PythonBridge.Protocol.request_frame(7, 250, ~s(,"command":"ping"})))
      ~s({"id":7,"timeout_ms":250,"command":"ping"})
  """
  @spec request_frame(non_neg_integer(), pos_integer() | :infinity, binary()) :: iodata()
  def request_frame(id, :infinity, body), do: [~s({"id":), Integer.to_string(id), body]

  def request_frame(id, timeout_ms, body) do
    [~s({"id":), Integer.to_string(id), ~s(,"timeout_ms":), Integer.to_string(timeout_ms), body]
  end

  @doc "Whether a body is that of a ping."
  @spec ping?(binary()) :: boolean()
  def ping?(body), do: String.starts_with?(body, ~s(,"command":"ping"))

  @doc """
  The control frame that cancels a request. It has no reply of its own.

      iex> IO.iodata_to_binary(DSPex.PythonBridge.Protocol.cancel_frame(7))
      ~s({"cancel":7})
  """
  @spec cancel_frame(non_neg_integer()) :: iodata()
  def cancel_frame(id), do: [~s({"cancel":), Integer.to_string(id), ?}]

  ## Replies

  @doc """
  The kind and id of a frame, from its first bytes: the peer writes `id` as the first key, and `stream`, `journal` or
  `tool_call` as the second; any other frame is a reply. Ids that the bridge does not give (strings, null, negative ones) are
  `:none`. A log record has no id: `log` is its first key.

      iex> DSPex.PythonBridge.Protocol.route(~s({"id":12,"success":true,"result":{}}))
      {:reply, 12}
      iex> DSPex.PythonBridge.Protocol.route(~s({"id":null,"success":false}))
      :none
  """
  @spec route(binary()) ::
          {:reply | :stream | :journal | :tool_call, non_neg_integer()} | :log | :none
  def route(<<"{\"id\":", rest::binary>>), do: route_value(rest)
  def route(<<"{\"log\":", _rest::binary>>), do: :log
  def route(frame) when is_binary(frame), do: :none

  # Python's own json.dumps writes a space here.
  defp route_value(<<?\s, rest::binary>>), do: route_value(rest)

  defp route_value(rest) do
    case take_id(rest, 0, 0) do
      {id, <<?,, rest::binary>>} -> route_kind(rest, id)
      {id, <<c, _rest::binary>>} when c in [?}, ?\s] -> {:reply, id}
      _another_form -> :none
    end
  end

  # The number that a binary begins with, and the rest.
  defp take_id(<<d, rest::binary>>, id, n) when d in ?0..?9 and n < @max_id_digits,
    do: take_id(rest, id * 10 + d - ?0, n + 1)

  defp take_id(_rest, _id, 0), do: :none
  defp take_id(rest, id, _n), do: {id, rest}

  defp route_kind(<<"\"stream\"", _rest::binary>>, id), do: {:stream, id}
  defp route_kind(<<"\"journal\"", _rest::binary>>, id), do: {:journal, id}
  defp route_kind(<<"\"tool_call\"", _rest::binary>>, id), do: {:tool_call, id}
  defp route_kind(<<?\s, rest::binary>>, id), do: route_kind(rest, id)
  defp route_kind(_rest, id), do: {:reply, id}

  @doc "Whether a reply with a number as its id is a success, from its first bytes."
  @spec success?(binary()) :: boolean()
  def success?(frame), do: frame =~ ~r/\A\{"id": ?\d+, ?"success": ?true/

  @doc """
  Decodes a reply: `{:ok, id, result}`, `{:error, id, error_text}` (`id` is nil if the peer could not read it), or
  `{:error, reason}` for bytes that are not a reply. Total: any binary gives one of the three.

      iex> DSPex.PythonBridge.Protocol.decode_response(~s({"id":1,"success":true,"result":{"a":1}}))
      {:ok, 1, %{"a" => 1}}
      iex> DSPex.PythonBridge.Protocol.decode_response(~s({"id":2,"success":false,"error":"Program not found: x"}))
      {:error, 2, "Program not found: x"}
      iex> DSPex.PythonBridge.Protocol.decode_response("hello")
      {:error, {:invalid_json, "not JSON: invalid byte at 0"}}
  """
  @spec decode_response(binary()) ::
          {:ok, id(), term()} | {:error, id() | nil, String.t()} | {:error, reason()}
  def decode_response(payload) when is_binary(payload) do
    case decode_reply(payload) do
      {:ok, id, result, _meta} -> {:ok, id, result}
      {:error, id, %Error{message: message}} -> {:error, id, message}
      {:error, reason} -> {:error, reason}
    end
  end

  @doc """
  As `decode_response/1`, with `meta` (a map with string keys, empty if the reply has none) and the error as
  `DSPex.PythonBridge.Error`, with the `meta` of its reply.
  """
  @spec decode_reply(binary()) ::
          {:ok, id(), term(), map()} | {:error, id() | nil, Error.t()} | {:error, reason()}
  def decode_reply(<<"{\"id\":", rest::binary>> = payload) do
    case take_id(rest, 0, 0) do
      {id, <<",\"success\":true,\"result\":", rest::binary>>} -> decode_success(payload, id, rest)
      _another_form -> decode_object(payload)
    end
  end

  def decode_reply(payload) when is_binary(payload), do: decode_object(payload)

  # What all successes begin with is not decoded: it would be half of the work for a small one.
  defp decode_success(payload, id, rest) do
    size = byte_size(payload)

    case Payload.decode_first(rest, size) do
      {:ok, result, "}"} ->
        {:ok, id, result, %{}}

      {:ok, result, <<",\"meta\":", rest::binary>>} ->
        with {:ok, %{} = meta, "}"} <- Payload.decode_first(rest, size),
             do: {:ok, id, result, meta},
             else: (_another_form -> decode_object(payload))

      _another_form ->
        decode_object(payload)
    end
  end

  defp decode_object(payload) do
    with {:ok, term} <- Payload.decode(payload), do: to_reply(term)
  end

  defp to_reply(%{"id" => id, "success" => true, "result" => result} = reply)
       when is_integer(id) or is_binary(id) do
    {:ok, id, result, with(%{"meta" => %{} = meta} <- reply, do: meta, else: (_none -> %{}))}
  end

  defp to_reply(%{"id" => id, "success" => false, "error" => error} = reply)
       when (is_integer(id) or is_binary(id) or is_nil(id)) and is_binary(error) do
    error = Error.from_peer(reply["error_type"], error, reply["retryable"], reply["meta"])
    {:error, id, error}
  end

  defp to_reply(%{}),
    do: {:error, {:not_a_reply, "an object without id, success and result or error"}}

  defp to_reply(_term), do: {:error, {:not_a_reply, "JSON, but no object"}}

  @doc "The reply that takes the place of one that is too large."
  @spec refusal_frame(non_neg_integer(), String.t()) :: binary()
  def refusal_frame(id, text),
    do:
      ~s({"id":#{id},"success":false,"error_type":"frame_too_large","error":#{JSON.encode!(text)}})

  ## Frames before a reply

  @doc "Decodes a chunk into a map with string keys. Total: any binary gives a chunk or an error."
  @spec decode_chunk(binary()) :: {:ok, id(), map()} | {:error, reason()}
  def decode_chunk(payload) do
    case Payload.decode(payload) do
      {:ok, %{"id" => id, "stream" => %{} = chunk}} when is_integer(id) or is_binary(id) ->
        {:ok, id, chunk}

      other ->
        reason(other, :not_a_chunk, "id and stream")
    end
  end

  defp reason({:ok, _term}, kind, keys), do: {:error, {kind, "JSON, but no object with #{keys}"}}
  defp reason({:error, reason}, _kind, _keys), do: {:error, reason}

  @doc "The chunk that a caller gets between those of two peers."
  @spec restarted_chunk() :: binary()
  def restarted_chunk, do: ~s({"id":0,"stream":{"status":"restarted"}})

  @doc """
  The entry of a frame of a journal, as the peer has written it; nil for bytes that are no such frame. It is not decoded: it
  is for a peer.

      iex> DSPex.PythonBridge.Protocol.journal_entry(~s({"id":7,"journal":{"n":1,"nth":0}}))
      ~s({"n":1,"nth":0})
  """
  @spec journal_entry(binary()) :: binary() | nil
  def journal_entry(frame) do
    size = byte_size(frame)

    with [{0, head}] <- Regex.run(~r/\A\{"id": ?\d+, ?"journal": ?(?=\{)/, frame, return: :index),
         "}}" <- binary_part(frame, size - 2, 2),
         do: binary_part(frame, head, size - head - 1),
         else: (_another_form -> nil)
  end

  @doc """
  Decodes a tool call: `{:ok, call_id, name, args}`, or `{:error, call_id, text}` for a call that can be answered but
  not made. Total.
  """
  @spec decode_tool_call(binary()) ::
          {:ok, id(), String.t(), map()} | {:error, id(), String.t()} | {:error, reason()}
  def decode_tool_call(payload) do
    case Payload.decode(payload) do
      {:ok, %{"tool_call" => %{"call_id" => id} = call}} when is_integer(id) or is_binary(id) ->
        case call do
          %{"name" => name, "args" => %{} = args} when is_binary(name) -> {:ok, id, name, args}
          _call -> {:error, id, "tool_call: expected a name and args"}
        end

      other ->
        reason(other, :not_a_tool_call, "tool_call and its call_id")
    end
  end

  @doc """
  The control frame with a tool's result, or an error text, for the peer. The error names the value that has no JSON
  form.

      iex> DSPex.PythonBridge.Protocol.encode_tool_result(7, {:ok, [1]})
      {:ok, ~s({"tool_result":{"call_id":7,"success":true,"result":[1]}})}
      iex> DSPex.PythonBridge.Protocol.encode_tool_result(7, {:error, "no network"})
      {:ok, ~s({"tool_result":{"call_id":7,"success":false,"error":"no network"}})}
  """
  @spec encode_tool_result(id(), {:ok, term()} | {:error, String.t()}) ::
          {:ok, binary()} | {:error, Error.t()}
  def encode_tool_result(call_id, {kind, value}) do
    key = if kind == :ok, do: "result", else: "error"

    with {:ok, json} <- Payload.encode(value, key) do
      rest = [~s(,"success":#{kind == :ok},"#{key}":), json, "}}"]
      {:ok, IO.iodata_to_binary([tool_result_head(call_id), rest])}
    end
  end

  @doc "The frame of `encode_tool_result/2` for another call."
  @spec readdress_tool_result(binary(), id(), id()) :: binary()
  def readdress_tool_result(frame, call_id, other) do
    [head, other_head] = for id <- [call_id, other], do: tool_result_head(id)
    IO.iodata_to_binary([other_head, binary_slice(frame, IO.iodata_length(head)..-1//1)])
  end

  # The ids are those of tool calls that were read.
  defp tool_result_head(call_id), do: [~s({"tool_result":{"call_id":), JSON.encode!(call_id)]

  ## Log records

  @doc """
  Decodes a log record: its level for Logger (`:info` for a level of its own), its message, and as metadata the name of
  its logger in Python, and the `traceparent` of its request, if that has one. Total.
  """
  @spec decode_log(binary()) ::
          {:ok, Logger.level(), String.t(), keyword(String.t() | nil)} | {:error, reason()}
  def decode_log(payload) do
    case Payload.decode(payload) do
      {:ok, %{"log" => %{"message" => message} = record}} when is_binary(message) ->
        {:ok, Map.get(@log_levels, record["level"], :info), message, log_metadata(record)}

      other ->
        reason(other, :not_a_log, "log and its message")
    end
  end

  defp log_metadata(%{"traceparent" => trace} = record) when is_binary(trace),
    do: [traceparent: trace] ++ log_metadata(Map.delete(record, "traceparent"))

  defp log_metadata(record),
    do: [python_logger: if(is_binary(record["logger"]), do: record["logger"])]
end
