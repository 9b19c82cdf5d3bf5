defmodule DSPex.PythonBridge.Durable.FileStore do
  @moduledoc """
  A store of durable runs in a folder, of one machine or shared: `store: {FileStore, "/var/lib/my_app/runs"}`.

  Each run has a folder of its own, which other users of the system cannot read. Its records are lines of one file, each with its
  checksum, and are on the disk before the run goes on. A crash while one is written loses that one; a line that is damaged later
  makes the run unreadable, with an error that says which line.

  Nodes that share the folder need clocks that differ by less than the lease. Ids have at most 180 bytes.
  """

  alias DSPex.PythonBridge.Durable.Store

  @behaviour Store

  # A claim is a file `claim.<number>` whose content is the owner and whose time of change, in whole seconds, is the end of
  # the lease. The highest number counts. Two that find it expired both make a link with the next number: the file system lets
  # one of them.
  @claim "claim."
  @records "records"
  @summary "summary"
  # A name of a file has at most 255 bytes, and 3 bytes of an id take 4 of it.
  @longest_id 180

  @impl Store
  @spec claim(Path.t(), Store.id(), Store.owner(), pos_integer()) ::
          :ok | {:error, :claimed | term()}
  def claim(_dir, id, _owner, _lease) when byte_size(id) > @longest_id,
    do: {:error, "an id has at most #{@longest_id} bytes"}

  def claim(dir, id, owner, lease) do
    folder = folder(dir, id)
    until = div(System.os_time(:millisecond) + lease, 1000) + 1

    with :ok <- File.mkdir_p(folder),
         :ok <- File.chmod(folder, 0o700),
         {:ok, last} <- last(folder) do
      case last do
        {number, ^owner, _until} ->
          renew(folder, number, until)

        {number, _other, until_then} ->
          if over?(until_then),
            do: take(folder, number + 1, owner, until),
            else: {:error, :claimed}

        nil ->
          take(folder, 1, owner, until)
      end
    end
  end

  defp renew(folder, number, until) do
    with :ok <- File.touch(path(folder, number), until), do: still_last(folder, number)
  end

  defp take(folder, number, owner, until) do
    draft = Path.join(folder, owner)

    with :ok <- File.write(draft, owner),
         :ok <- File.touch(draft, until),
         linked = File.ln(draft, path(folder, number)),
         _gone = File.rm(draft),
         :ok <- linked,
         # An earlier claim may have been looked at before it was over and its successors gone.
         :ok <- still_last(folder, number),
         {:ok, numbers} <- numbers(folder) do
      for lower <- numbers, lower < number, do: File.rm(path(folder, lower))
      File.rm(Path.join(folder, @summary))
      cut_torn_end(folder)
    else
      {:error, :eexist} -> {:error, :claimed}
      error -> error
    end
  end

  defp still_last(folder, number) do
    with {:ok, numbers} <- numbers(folder) do
      if Enum.max(numbers) == number do
        :ok
      else
        File.rm(path(folder, number))
        {:error, :claimed}
      end
    end
  end

  # What another owner wrote when it, or the machine, ended.
  defp cut_torn_end(folder) do
    file = Path.join(folder, @records)

    with {:ok, bytes} <- contents(file),
         {:ok, _records, torn} when torn > 0 <- parse(bytes),
         {:ok, device} <- :file.open(file, [:read, :write, :raw, :binary]) do
      {:ok, _position} = :file.position(device, byte_size(bytes) - torn)
      cut = :file.truncate(device)
      :ok = :file.close(device)
      cut
    else
      {:ok, _records, 0} -> :ok
      # Damage is told by read/2.
      {:damaged, _number} -> :ok
      error -> error
    end
  end

  @impl Store
  @spec append(Path.t(), Store.id(), Store.owner(), binary()) :: :ok | {:error, term()}
  def append(dir, id, owner, record) do
    folder = folder(dir, id)

    with :ok <- owned(folder, owner),
         {:ok, device} <- :file.open(Path.join(folder, @records), [:append, :raw, :binary]) do
      written =
        with :ok <- :file.write(device, [checksum(record), ?\s, record, ?\n]),
             do: :file.datasync(device)

      with :ok <- :file.close(device), do: written
    end
  end

  @impl Store
  @spec read(Path.t(), Store.id()) :: {:ok, [binary()]} | {:error, term()}
  def read(dir, id) do
    with {:ok, bytes} <- contents(Path.join(folder(dir, id), @records)) do
      case parse(bytes) do
        {:ok, records, _torn} -> {:ok, records}
        {:damaged, number} -> {:error, "record #{number} is damaged"}
      end
    end
  end

  @impl Store
  @spec finish(Path.t(), Store.id(), Store.owner(), binary()) :: :ok | {:error, term()}
  def finish(dir, id, owner, summary) do
    folder = folder(dir, id)
    draft = Path.join(folder, owner)

    with :ok <- owned(folder, owner),
         :ok <- File.write(draft, summary),
         :ok <- File.rename(draft, Path.join(folder, @summary)),
         {:ok, {number, ^owner, _until}} <- last(folder) do
      File.touch(path(folder, number), 0)
    else
      {:ok, _another} -> {:error, :claimed}
      error -> error
    end
  end

  @impl Store
  @spec list(Path.t()) ::
          {:ok, [{Store.id(), boolean(), binary() | nil}]} | {:error, term()}
  def list(dir) do
    case File.ls(dir) do
      {:ok, names} -> {:ok, for(name <- names, run = listed(dir, name), do: run)}
      {:error, :enoent} -> {:ok, []}
      error -> error
    end
  end

  defp listed(dir, name) do
    with {:ok, id} <- Base.url_decode64(name, padding: false),
         {:ok, last} <- last(Path.join(dir, name)) do
      claimed? = last != nil and not over?(elem(last, 2))
      summary = with {:ok, text} <- File.read(Path.join([dir, name, @summary])), do: text
      {id, claimed?, if(is_binary(summary), do: summary)}
    else
      # It is not a run's, or was erased meanwhile.
      _none -> nil
    end
  end

  @impl Store
  @spec delete(Path.t(), Store.id()) :: :ok | {:error, term()}
  def delete(dir, id) do
    with {:ok, _paths} <- File.rm_rf(folder(dir, id)),
         do: :ok,
         else: ({:error, reason, _path} -> {:error, reason})
  end

  ## Claims

  # The claim that counts: its number, its owner and its end.
  defp last(folder) do
    with {:ok, [_ | _] = numbers} <- numbers(folder),
         file = path(folder, Enum.max(numbers)),
         {:ok, owner} <- File.read(file),
         {:ok, %File.Stat{mtime: until}} <- File.stat(file, time: :posix) do
      {:ok, {Enum.max(numbers), owner, until}}
    else
      {:ok, []} -> {:ok, nil}
      # Another owner has just come.
      {:error, :enoent} -> {:error, :claimed}
      error -> error
    end
  end

  defp owned(folder, owner) do
    case last(folder) do
      {:ok, {_number, ^owner, until}} -> if over?(until), do: {:error, :claimed}, else: :ok
      {:ok, _another} -> {:error, :claimed}
      error -> error
    end
  end

  defp numbers(folder) do
    with {:ok, names} <- File.ls(folder),
         do: {:ok, for(@claim <> number <- names, do: String.to_integer(number))}
  end

  defp over?(until), do: until <= System.os_time(:second)

  ## Records

  defp contents(file) do
    with {:error, :enoent} <- File.read(file), do: {:ok, ""}
  end

  # The records, and how many bytes at the end are a part of one.
  defp parse(bytes), do: parse(bytes, 1, [])

  defp parse(bytes, number, records) do
    case :binary.split(bytes, "\n") do
      [<<sum::binary-8, ?\s, record::binary>>, rest] ->
        cond do
          sum == checksum(record) -> parse(rest, number + 1, [record | records])
          rest == "" -> {:ok, Enum.reverse(records), byte_size(bytes)}
          true -> {:damaged, number}
        end

      [_line, rest] when rest != "" ->
        {:damaged, number}

      _end ->
        {:ok, Enum.reverse(records), byte_size(bytes)}
    end
  end

  defp checksum(record),
    do: record |> :erlang.crc32() |> Integer.to_string(16) |> String.pad_leading(8, "0")

  defp folder(dir, id), do: Path.join(dir, Base.url_encode64(id, padding: false))
  defp path(folder, number), do: Path.join(folder, "#{@claim}#{number}")
end
