defmodule DSPex.PythonBridge.Protocol.Payload do
  @moduledoc false
  # Terms to JSON and back, with errors as values: total for any term and any binary.

  alias DSPex.PythonBridge.Error

  # Copying makes decoding of many short strings take half as long again. Smaller payloads are not copied: they keep
  # no more than this alive.
  @large_bytes 4_096

  @doc """
  A term as JSON. The error names the value that has no JSON form, after `what`, which says where it is.

      iex> {:ok, json} = DSPex.PythonBridge.Protocol.Payload.encode(%{n: 1}, "args")
      iex> IO.iodata_to_binary(json)
      ~s({"n":1})
      iex> {:error, error} = DSPex.PythonBridge.Protocol.Payload.encode(%{f: {1, 2}}, "args")
      iex> error.message
      "args: no JSON form for {1, 2}"
  """
  @spec encode(term(), String.t()) :: {:ok, iodata()} | {:error, Error.t()}
  # Encoders are user code (a protocol): what one raises or throws becomes an error.
  def encode(term, what) do
    {:ok, JSON.encode_to_iodata!(term)}
  catch
    :error, %Protocol.UndefinedError{value: value} ->
      {:error, Error.new(:invalid_args, "#{what}: no JSON form for #{brief(value)}")}

    :error, reason when reason == :unexpected_end or elem(reason, 0) == :invalid_byte ->
      {:error, Error.new(:invalid_args, "#{what}: a string in it is not valid UTF-8")}

    _kind, _reason ->
      {:error, Error.new(:invalid_args, "#{what}: cannot be written as JSON")}
  end

  # Inspection is user code, too.
  defp brief(value) do
    inspect(value, limit: 3, printable_limit: 40)
  catch
    _kind, _reason -> "a value that cannot be shown"
  end

  @doc "A name as JSON writes it, of an atom or a string; nil for any other term."
  @spec string(term()) :: String.t() | nil
  def string(name) when is_atom(name) and name not in [nil, true, false],
    do: Atom.to_string(name)

  def string(name) when is_binary(name), do: name
  def string(_other), do: nil

  @doc """
  The term of a payload, or why it is not JSON. No string in the term keeps a large payload alive that is more than
  twice its size.

      iex> DSPex.PythonBridge.Protocol.Payload.decode("[1]")
      {:ok, [1]}
      iex> DSPex.PythonBridge.Protocol.Payload.decode("hello")
      {:error, {:invalid_json, "not JSON: invalid byte at 0"}}
  """
  @spec decode(binary()) :: {:ok, term()} | {:error, {:invalid_json, String.t()}}
  def decode(payload) do
    size = byte_size(payload)

    case decode_first(payload, size) do
      {:ok, term, ""} -> {:ok, term}
      {:ok, _term, rest} -> not_json("not JSON: invalid byte at #{size - byte_size(rest)}")
      {:error, reason} -> {:error, reason}
    end
  end

  @doc """
  The term that bytes of a payload begin with, and the bytes after it. `size`: of the whole payload, in bytes.

      iex> DSPex.PythonBridge.Protocol.Payload.decode_first(~s([1],"meta"), 20)
      {:ok, [1], ~s(,"meta")}
  """
  @spec decode_first(binary(), non_neg_integer()) ::
          {:ok, term(), rest :: binary()} | {:error, {:invalid_json, String.t()}}
  # JSON.decode/3 has no limit of depth and returns errors as tuples, but raises for some input (an integer past the
  # system's limit).
  def decode_first(bytes, size) do
    case JSON.decode(bytes, :none, decoders(size)) do
      {term, :none, rest} -> {:ok, term, rest}
      {:error, {:unexpected_end, _at}} -> not_json("JSON that ends too early")
      {:error, {_what, at, _bytes}} -> not_json("not JSON: invalid byte at #{at}")
    end
  catch
    _kind, _reason -> not_json("JSON that cannot be decoded")
  end

  defp not_json(text), do: {:error, {:invalid_json, text}}

  defp decoders(size) when size < @large_bytes, do: []
  # Strings without escapes are parts of the payload, not copies.
  defp decoders(size), do: [string: &own(&1, div(size, 2))]

  defp own(text, half) when byte_size(text) < half, do: :binary.copy(text)
  defp own(text, _half), do: text
end
