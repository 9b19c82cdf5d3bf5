defmodule DSPex.Test.LiveViewStandIn do
  @moduledoc """
  In the place of Phoenix LiveView, which cannot be had here: a process that owns a socket and calls a view's callbacks, and
  the functions that a view calls. As there, the process of `start_async` is linked to the view, its result counts only while it
  is the last one under its key, and `cancel_async` ends it with `{:shutdown, :cancel}`.
  """

  use GenServer

  @callback mount(map(), map(), map()) :: {:ok, map()}
  @callback render(map()) :: term()
  @callback handle_event(String.t(), map(), map()) :: {:noreply, map()}
  @callback handle_info(term(), map()) :: {:noreply, map()}
  @callback handle_async(atom(), {:ok, term()} | {:exit, term()}, map()) :: {:noreply, map()}
  @optional_callbacks handle_event: 3, handle_info: 2, handle_async: 3

  @doc "What `use MyAppWeb, :live_view` brings."
  defmacro __using__(_opts) do
    quote do
      @behaviour DSPex.Test.LiveViewStandIn
      import DSPex.Test.LiveViewStandIn,
        only: [assign: 2, update: 3, start_async: 3, assign_async: 3, cancel_async: 2, sigil_H: 2]
    end
  end

  ## What a test does

  @doc "Opens a view as a connected one; not linked, as its user may leave."
  def open(view, params \\ %{}), do: GenServer.start(__MODULE__, {view, params})

  @doc "An event of the browser."
  def event(pid, name, params \\ %{}), do: GenServer.call(pid, {:event, name, params})

  @doc "What the template would show."
  def assigns(pid), do: GenServer.call(pid, :assigns)

  @doc "The user leaves the page."
  def leave(pid), do: GenServer.stop(pid, {:shutdown, :left})

  ## What a view does

  def assign(socket, assigns), do: %{socket | assigns: Enum.into(assigns, socket.assigns)}

  def update(socket, key, fun), do: assign(socket, [{key, fun.(Map.fetch!(socket.assigns, key))}])

  def start_async(socket, key, fun), do: start(socket, key, fun, :start)

  def assign_async(socket, key, fun),
    do: socket |> assign([{key, :loading}]) |> start(key, fun, :assign)

  def cancel_async(socket, key) do
    with {_ref, pid, _kind} <- socket.async[key] do
      Process.unlink(pid)
      Process.exit(pid, {:shutdown, :cancel})
    end

    socket
  end

  @doc "The template, which is not rendered."
  defmacro sigil_H({:<<>>, _meta, [template]}, []) do
    quote do
      _ = var!(assigns)
      unquote(template)
    end
  end

  defp start(socket, key, fun, kind) do
    view = self()

    {:ok, pid} =
      Task.start_link(fn ->
        receive do
          {:begin, ref} -> send(view, {:async, ref, key, {:ok, fun.()}})
        end

        Process.unlink(view)
      end)

    ref = Process.monitor(pid, tag: {:ended, key})
    send(pid, {:begin, ref})
    %{socket | async: Map.put(socket.async, key, {ref, pid, kind})}
  end

  ## The process

  @impl GenServer
  def init({view, params}) do
    socket = %{view: view, assigns: %{}, async: %{}}
    {:ok, socket} = view.mount(params, %{}, socket)
    {:ok, socket}
  end

  @impl GenServer
  def handle_call({:event, name, params}, _from, socket) do
    {:noreply, socket} = socket.view.handle_event(name, params, socket)
    {:reply, :ok, socket}
  end

  def handle_call(:assigns, _from, socket), do: {:reply, socket.assigns, socket}

  @impl GenServer
  def handle_info({:async, ref, key, result}, socket) do
    Process.demonitor(ref, [:flush])
    {:noreply, over(socket, ref, key, result)}
  end

  def handle_info({{:ended, key}, ref, :process, _pid, reason}, socket),
    do: {:noreply, over(socket, ref, key, {:exit, reason})}

  def handle_info(message, socket) do
    {:noreply, socket} = socket.view.handle_info(message, socket)
    {:noreply, socket}
  end

  defp over(socket, ref, key, result) do
    case socket.async[key] do
      {^ref, _pid, kind} ->
        done(kind, %{socket | async: Map.delete(socket.async, key)}, key, result)

      _a_later_one ->
        socket
    end
  end

  defp done(:start, socket, key, result) do
    {:noreply, socket} = socket.view.handle_async(key, result, socket)
    socket
  end

  defp done(:assign, socket, key, {:ok, {:ok, assigns}}),
    do: assign(socket, [{key, {:ok, Map.fetch!(assigns, key)}}])

  defp done(:assign, socket, key, {:ok, {:error, reason}}),
    do: assign(socket, [{key, {:failed, reason}}])
end

defmodule MyAppWeb do
  @moduledoc "That of the application of the pages."
  defmacro __using__(:live_view), do: quote(do: use(DSPex.Test.LiveViewStandIn))
end
