defmodule DSPex.PythonBridge.Venv.Lock do
  @moduledoc false
  # One run at a time per folder: a symbolic link in it, whose target names the process that holds it. A link is made in
  # one step, with its target.

  alias DSPex.PythonBridge.OS
  alias DSPex.PythonBridge.Venv.Manifest

  # Another run may end, and remove the folder, in between.
  @attempts 10
  # Where nothing can be written, `fun` can only read.
  @read_only [:eacces, :eperm, :erofs]

  @doc """
  Runs `fun` with the folder locked; an error while another process holds the lock. A missing folder is made, and
  removed again if nothing is in it.
  """
  @spec hold(Path.t(), (-> result)) :: result | {:error, String.t()} when result: term()
  def hold(folder, fun), do: hold(folder, fun, @attempts)

  defp hold(folder, fun, attempts) do
    new? = not File.dir?(folder)

    with :ok <- File.mkdir_p(folder),
         :ok <- take(folder, Manifest.lock(folder)) do
      try do
        fun.()
      after
        File.rm(Manifest.lock(folder))
        if new?, do: File.rmdir(folder)
      end
    else
      :read_only ->
        fun.()

      {:error, :enoent} when attempts > 1 ->
        hold(folder, fun, attempts - 1)

      {:error, text} when is_binary(text) ->
        {:error, text}

      {:error, reason} ->
        {:error, "#{folder} cannot be written to: #{:file.format_error(reason)}"}
    end
  end

  defp take(folder, lock) do
    with {:error, :eexist} <- File.ln_s(holder(), lock),
         {:ok, holder} <- File.read_link(lock),
         {os_pid, started, pid} <- parse(holder) do
      if ended?(os_pid, started, pid),
        do: take_over(folder, lock, holder),
        else: {:error, "another dspex.setup (process #{os_pid}) is working on #{folder}"}
    else
      {:error, reason} when reason in @read_only -> :read_only
      :unknown -> {:error, "#{lock} is not what dspex.setup made: remove it yourself"}
      ok_or_error -> ok_or_error
    end
  end

  # Renamed first, and read again: another process may hold it by now.
  defp take_over(folder, lock, holder) do
    mine = "#{lock}.#{System.pid()}"

    with :ok <- File.rename(lock, mine) do
      if File.read_link(mine) == {:ok, holder}, do: File.rm(mine), else: File.rename(mine, lock)
      take(folder, lock)
    end
  end

  defp holder do
    os_pid = String.to_integer(System.pid())
    "#{os_pid} #{OS.Process.start_time(os_pid)} #{:erlang.pid_to_list(self())}"
  end

  defp parse(holder) do
    case Regex.run(~r/\A(\d+) (\d*) (<[\d.]+>)\z/, holder, capture: :all_but_first) do
      [os_pid, started, pid] -> {String.to_integer(os_pid), started, to_charlist(pid)}
      nil -> :unknown
    end
  end

  defp ended?(os_pid, started, pid) do
    if "#{os_pid}" == System.pid() and started == "#{OS.Process.start_time(os_pid)}",
      do: not Process.alive?(:erlang.list_to_pid(pid)),
      else: OS.Process.gone?(os_pid, if(started != "", do: started))
  end
end
