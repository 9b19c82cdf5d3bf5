defmodule DSPex.PythonBridge.Protocol.Payload do
  @moduledoc false
  # Terms to JSON and back, with errors as values: total for any term and any binary.

  alias DSPex.PythonBridge.Error

  # Copying makes decoding of many short strings take half as long again. Smaller payloads are not copied: they keep
  # no more than this alive.
  @large_bytes 4_096

  @doc """
  A term as JSON. The error names the place of the innermost value that has no JSON form, after `what`, and does not show
  the value, which may be a key.

      iex> {:error, error} = DSPex.PythonBridge.Protocol.Payload.encode(%{inputs: [%{q: {:b, 1}}]}, "args")
      iex> error.message
      "args.inputs[0].q: a tuple has no JSON form; a keyword list has to be written as a map"
  """
  @spec encode(term(), String.t()) :: {:ok, iodata()} | {:error, Error.t()}
  def encode(term, what) do
    with :error <- json(term), do: {:error, Error.new(:invalid_args, what <> misfit(term))}
  end

  # Encoders are user code (a protocol): what one raises or throws becomes an error.
  defp json(term) do
    {:ok, JSON.encode_to_iodata!(term)}
  catch
    _kind, _reason -> :error
  end

  defp misfit(term) do
    Enum.find_value(parts(term), ": #{kind(term)}", fn {key, part} ->
      if json(part) == :error, do: key <> misfit(part)
    end)
  end

  defp parts(%{} = map) when not is_struct(map),
    do: for({key, value} <- map, do: {".#{string(key) || "?"}", value})

  defp parts([_ | _] = list) when length(list) > 0,
    do: Enum.with_index(list, fn value, n -> {"[#{n}]", value} end)

  defp parts(_other), do: []

  defp kind(tuple) when is_tuple(tuple),
    do: "a tuple has no JSON form; a keyword list has to be written as a map"

  defp kind(%module{}), do: "a struct #{inspect(module)} has no JSON form"
  defp kind(%{}), do: "expected a map whose keys are strings"
  defp kind(text) when is_binary(text), do: "a string that is not valid UTF-8"
  defp kind(function) when is_function(function), do: "a function has no JSON form"
  defp kind(_other), do: "it has no JSON form"

  @doc "A name as JSON writes it, of an atom or a string; nil for any other term."
  @spec string(term()) :: String.t() | nil
  def string(name) when is_atom(name) and name not in [nil, true, false],
    do: Atom.to_string(name)

  def string(name) when is_binary(name), do: name
  def string(_other), do: nil

  @doc """
  The term of a payload, or why it is not JSON. No string in the term keeps a large payload alive that is more than
  twice its size.
  """
  @spec decode(binary()) :: {:ok, term()} | {:error, {:invalid_json, String.t()}}
  def decode(payload) when is_binary(payload) do
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
