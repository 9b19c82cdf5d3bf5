defmodule DSPex.Test.StoreContract do
  @moduledoc "What each store of durable runs promises."

  import ExUnit.Assertions

  @long 60_000

  @doc "Of an empty store."
  def check(store, term) do
    assert {:ok, []} = store.read(term, "r")
    assert {:ok, []} = store.list(term)
    assert :ok = store.claim(term, "r", "one", @long)
    assert {:error, :claimed} = store.claim(term, "r", "two", @long)
    assert :ok = store.claim(term, "r", "one", @long)
    assert :ok = store.append(term, "r", "one", "a")
    assert {:error, :claimed} = store.append(term, "r", "two", "b")
    assert {:error, :claimed} = store.finish(term, "r", "two", "{}")
    assert :ok = store.append(term, "r", "one", "c")
    assert {:ok, [{"r", true, nil}]} = store.list(term)
    assert :ok = store.finish(term, "r", "one", "{}")
    assert {:ok, [{"r", false, "{}"}]} = store.list(term)
    assert {:error, :claimed} = store.append(term, "r", "one", "d")
    assert :ok = store.claim(term, "r", "two", @long)
    assert {:ok, [{"r", true, nil}]} = store.list(term)
    assert {:ok, ["a", "c"]} = store.read(term, "r")
    assert :ok = store.delete(term, "r")
    assert {:ok, []} = store.list(term)
    assert {:ok, []} = store.read(term, "r")

    # Of many at once, one.
    for id <- ["a", "b", "c", "d", "e"] do
      claim = &store.claim(term, id, "owner#{&1}", @long)
      claims = for {:ok, claim} <- Task.async_stream(1..20, claim, max_concurrency: 20), do: claim
      assert Enum.count(claims, &(&1 == :ok)) == 1
      assert Enum.sort(Enum.uniq(claims)) == [:ok, {:error, :claimed}]
    end
  end
end
