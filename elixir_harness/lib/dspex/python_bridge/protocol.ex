defmodule DSPex.PythonBridge.Protocol do
  @moduledoc """
  Payloads in, terms out, and back: JSON in UTF-8, one object a frame. No process, no I/O; the
  4-byte length in front of a payload is the port's business (`{:packet, 4}`).

  The work is split so that the bridge's process touches few bytes: the caller writes all of a
  request but its head (`encode_body/3`) and decodes its own reply (`decode_reply/1`); the bridge
  puts the head before it (`request_frame/3`) and finds whose reply a frame is from its first
  bytes (`route/1`).
  """

  alias DSPex.PythonBridge.Error

  # Longer ids are not ours; the limit keeps `route/1` cheap on any bytes.
  @max_id_digits 18

  @type id :: integer() | String.t()
  @type command :: atom() | String.t()
  @type reason :: {:invalid_json, String.t()} | {:not_a_reply, String.t()}

  ## Requests

  @doc """
  The payload of a whole request. `id` is the first key; `timestamp` is now, UTC, ISO 8601.

  Raises `ArgumentError` for what cannot be a request (an id that is neither integer nor text,
  `args` that have no JSON form).

      iex> payload = DSPex.PythonBridge.Protocol.encode_request(1, :ping, %{})
      iex> String.starts_with?(payload, ~s({"id":1,"command":"ping","args":{},"timestamp":"20))
      true
  """
  @spec encode_request(id(), command(), map()) :: binary()
  def encode_request(id, command, args) when is_integer(id) or is_binary(id) do
    with {:ok, id_json} <- encode_json(id, "id"),
         {:ok, body} <- encode_body(command, args) do
      IO.iodata_to_binary([~s({"id":), id_json, body])
    else
      {:error, error} -> raise ArgumentError, error.message
    end
  end

  def encode_request(_id, _command, _args) do
    raise ArgumentError, "id: expected an integer or a text"
  end

  @doc """
  All of a request that comes after its id (and deadline), for `request_frame/3`.

  Options: `meta: true` asks for `meta` in the reply. The error names what has no JSON form.

      iex> {:ok, body} = DSPex.PythonBridge.Protocol.encode_body("ping", %{n: 1})
      iex> String.starts_with?(body, ~s(,"command":"ping","args":{"n":1},"timestamp":"))
      true
      iex> {:error, error} = DSPex.PythonBridge.Protocol.encode_body(:ping, %{f: {1, 2}})
      iex> error.message
      "args: no JSON form for {1, 2}"
  """
  @spec encode_body(command(), map(), meta: boolean()) :: {:ok, binary()} | {:error, Error.t()}
  def encode_body(command, args, opts \\ []) do
    with {:ok, command_json} <- encode_command(command),
         {:ok, args_json} <- encode_args(args) do
      meta = if opts[:meta], do: ~s(,"meta":true), else: ""

      # One binary made at once is half the cost of a list of parts.
      {:ok,
       <<",\"command\":", IO.iodata_to_binary(command_json)::binary, ",\"args\":",
         IO.iodata_to_binary(args_json)::binary, meta::binary, ",\"timestamp\":\"",
         timestamp()::binary, "\"}">>}
    end
  end

  @doc """
  The payload of a request from its id, its deadline in milliseconds and the body that
  `encode_body/3` made.

      iex> IO.iodata_to_binary(DSPex.PythonBridge.Protocol.request_frame(7, 250, ~s(,"command":"ping"})))
      ~s({"id":7,"timeout_ms":250,"command":"ping"})
  """
  @spec request_frame(non_neg_integer(), pos_integer() | :infinity, binary()) :: iodata()
  def request_frame(id, :infinity, body), do: [~s({"id":), Integer.to_string(id), body]

  def request_frame(id, timeout_ms, body) do
    [~s({"id":), Integer.to_string(id), ~s(,"timeout_ms":), Integer.to_string(timeout_ms), body]
  end

  @doc """
  Whether a body is that of a ping.

      iex> {:ok, body} = DSPex.PythonBridge.Protocol.encode_body(:ping, %{})
      iex> DSPex.PythonBridge.Protocol.ping?(body)
      true
  """
  @spec ping?(binary()) :: boolean()
  def ping?(<<",\"command\":\"ping\"", _rest::binary>>), do: true
  def ping?(body) when is_binary(body), do: false

  @doc """
  The control frame that takes a request back. It has no reply of its own.

      iex> IO.iodata_to_binary(DSPex.PythonBridge.Protocol.cancel_frame(7))
      ~s({"cancel":7})
  """
  @spec cancel_frame(non_neg_integer()) :: iodata()
  def cancel_frame(id), do: [~s({"cancel":), Integer.to_string(id), ?}]

  ## Replies

  @doc """
  Whose frame this is, from its first bytes: the peer writes `id` as the first key. Ids that the
  bridge never gives (texts, null, negative ones) are `:none`.

      iex> DSPex.PythonBridge.Protocol.route(~s({"id":12,"success":true,"result":{}}))
      {:reply, 12}
      iex> DSPex.PythonBridge.Protocol.route(~s({"id":null,"success":false}))
      :none
  """
  @spec route(binary()) :: {:reply, non_neg_integer()} | :none
  def route(<<"{\"id\":", rest::binary>>), do: route_value(rest)
  def route(frame) when is_binary(frame), do: :none

  # Python's own json.dumps writes a space here.
  defp route_value(<<?\s, rest::binary>>), do: route_value(rest)
  defp route_value(<<d, rest::binary>>) when d in ?0..?9, do: route_digits(rest, d - ?0, 1)
  defp route_value(_rest), do: :none

  defp route_digits(<<d, rest::binary>>, id, n) when d in ?0..?9 and n < @max_id_digits,
    do: route_digits(rest, id * 10 + d - ?0, n + 1)

  defp route_digits(<<c, _rest::binary>>, id, _n) when c in [?,, ?}, ?\s], do: {:reply, id}
  defp route_digits(_rest, _id, _n), do: :none

  @doc """
  Whether a reply with a number as its id tells of success, from its first bytes.

      iex> DSPex.PythonBridge.Protocol.success?(~s({"id":12,"success":true,"result":{}}))
      true
  """
  @spec success?(binary()) :: boolean()
  def success?(frame), do: frame =~ ~r/\A\{"id": ?\d+, ?"success": ?true/

  @doc """
  What a reply says: `{:ok, id, result}`, `{:error, id, error_text}` (`id` is nil in an error that
  the peer could give to nobody), or `{:error, reason}` for bytes that are no reply. Total: any
  binary gives one of the three.

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
  As `decode_response/1`, with nothing left out: `meta` (a map with string keys, empty when the
  reply has none) and the error as `DSPex.PythonBridge.Error`.
  """
  @spec decode_reply(binary()) ::
          {:ok, id(), term(), map()} | {:error, id() | nil, Error.t()} | {:error, reason()}
  def decode_reply(payload) when is_binary(payload) do
    with {:ok, term} <- decode_json(payload), do: to_reply(term)
  end

  defp to_reply(%{"id" => id, "success" => true, "result" => result} = reply)
       when is_integer(id) or is_binary(id) do
    case reply do
      %{"meta" => %{} = meta} -> {:ok, id, result, meta}
      _no_meta -> {:ok, id, result, %{}}
    end
  end

  defp to_reply(%{"id" => id, "success" => false, "error" => error} = reply)
       when (is_integer(id) or is_binary(id) or is_nil(id)) and is_binary(error) do
    {:error, id, Error.from_peer(reply["error_type"], error, reply["retryable"])}
  end

  defp to_reply(%{}),
    do: {:error, {:not_a_reply, "an object without id, success and result or error"}}

  defp to_reply(_term), do: {:error, {:not_a_reply, "JSON, but no object"}}

  ## JSON

  defp encode_command(command) when is_atom(command) and command not in [nil, true, false],
    do: encode_json(Atom.to_string(command), "command")

  defp encode_command(command) when is_binary(command), do: encode_json(command, "command")

  defp encode_command(_command),
    do: {:error, Error.new(:invalid_request, "command: expected an atom or a text")}

  defp encode_args(args) when args == %{}, do: {:ok, "{}"}
  defp encode_args(args) when is_map(args), do: encode_json(args, "args")
  defp encode_args(_args), do: {:error, Error.new(:invalid_args, "args: expected a map")}

  # Encoders are code of the caller's (a protocol): whatever one raises or throws is an error text.
  defp encode_json(term, what) do
    {:ok, JSON.encode_to_iodata!(term)}
  catch
    :error, %Protocol.UndefinedError{value: value} ->
      {:error, Error.new(:invalid_args, "#{what}: no JSON form for #{brief(value)}")}

    :error, reason when reason == :unexpected_end or elem(reason, 0) == :invalid_byte ->
      {:error, Error.new(:invalid_args, "#{what}: a text in it is not valid UTF-8")}

    _kind, _reason ->
      {:error, Error.new(:invalid_args, "#{what}: cannot be written as JSON")}
  end

  # So is inspection.
  defp brief(value) do
    inspect(value, limit: 3, printable_limit: 40)
  catch
    _kind, _reason -> "a value that cannot be shown"
  end

  # JSON.decode/1 has no limit of depth and gives errors as tuples, but some input makes it raise
  # (an integer past the system's limit): totality is made here.
  defp decode_json(payload) do
    case JSON.decode(payload) do
      {:ok, term} ->
        {:ok, term}

      {:error, {:unexpected_end, _at}} ->
        {:error, {:invalid_json, "JSON that ends too early"}}

      {:error, {_what, at, _bytes}} ->
        {:error, {:invalid_json, "not JSON: invalid byte at #{at}"}}
    end
  catch
    _kind, _reason -> {:error, {:invalid_json, "JSON that cannot be decoded"}}
  end

  # DateTime.to_iso8601/1 costs 1.2 µs, a tenth of a whole call.
  defp timestamp do
    {{year, month, day}, {hour, minute, second}} = :erlang.universaltime()

    <<Integer.to_string(year)::binary, ?-, tens(month), ones(month), ?-, tens(day), ones(day), ?T,
      tens(hour), ones(hour), ?:, tens(minute), ones(minute), ?:, tens(second), ones(second), ?Z>>
  end

  defp tens(n), do: ?0 + div(n, 10)
  defp ones(n), do: ?0 + rem(n, 10)
end
