-- Keep a snapshot unless a newer one is kept. Two replicas may save at once; the one that saw more events wins.
--
-- KEYS[1]  the run's snapshot (hash with the fields `position` and `data`)
-- ARGV[1]  position: how many events the snapshot has folded
-- ARGV[2]  the snapshot, any bytes
--
-- Returns 1 if it was kept, 0 if a newer one stands.

local standing = redis.call("HGET", KEYS[1], "position")
if standing and tonumber(standing) > tonumber(ARGV[1]) then
  return 0
end
redis.call("HSET", KEYS[1], "position", ARGV[1], "data", ARGV[2])
return 1
