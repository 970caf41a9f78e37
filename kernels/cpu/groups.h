// Pairs of a token and one of its experts, sorted by expert, so that a thread reads a part of an
// expert's weights once for all of its tokens. Needs vectors.h.

namespace {

// The most pairs, and floats for their rows, that are in work at the same time.
constexpr int64_t kMaxPairs = 8192, kMaxRowFloats = 32 << 20;

// The pairs of a range of tokens, sorted by expert; pairs of one expert keep their order. Pairs whose
// expert is negative have no place.
struct Groups {
  struct Group {
    int64_t expert, first, num;  // the group's pairs are at first .. first + num - 1
  };
  std::vector<Group> groups;       // of the experts that have pairs
  std::vector<int32_t> pair;       // the pair at each place
  std::vector<int32_t> place_of;   // [P]: the place of each pair, or -1

  Groups(const int32_t* expert, int64_t num_pairs, int64_t num_experts)
      : place_of(num_pairs, -1) {
    std::vector<int32_t> next(num_experts + 1);
    for (int64_t p = 0; p < num_pairs; ++p)
      if (expert[p] >= 0) ++next[expert[p] + 1];
    for (int64_t e = 0; e < num_experts; ++e) {
      if (next[e + 1]) groups.push_back({e, next[e], next[e + 1]});
      next[e + 1] += next[e];
    }
    pair.resize(next[num_experts]);
    for (int64_t p = 0; p < num_pairs; ++p) {
      if (expert[p] < 0) continue;
      place_of[p] = next[expert[p]]++;
      pair[place_of[p]] = (int32_t)p;
    }
  }
};

bool are_valid(const int32_t* expert, int64_t num_pairs, int64_t lowest, int64_t num_experts) {
  for (int64_t p = 0; p < num_pairs; ++p)
    if (expert[p] < lowest || expert[p] >= num_experts) return false;
  return true;
}

// Calls work(first, num) for equal ranges of rows, each with a bounded number of pairs.
template <typename Work>
void for_blocks(int64_t num_rows, int64_t pairs_per_row, int64_t floats_per_pair,
                const Work& work) {
  const int64_t max_pairs = std::min(kMaxPairs, kMaxRowFloats / floats_per_pair);
  const int64_t max_rows = std::max<int64_t>(1, max_pairs / pairs_per_row);
  const int64_t num_blocks = (num_rows + max_rows - 1) / max_rows;
  for (int64_t i = 0; i < num_blocks; ++i) {
    const int64_t first = num_rows * i / num_blocks;
    work(first, num_rows * (i + 1) / num_blocks - first);
  }
}

// A part of the outputs of one group, as a thread takes it.
struct Part {
  const Groups::Group* group;
  int64_t first, end;
};

// Calls work(part) for all outputs of all groups.
template <typename Work>
void for_parts(const Groups& groups, int64_t num_outputs, int64_t chunk, int64_t num_threads,
               const Work& work) {
  const int64_t num_chunks = (num_outputs + chunk - 1) / chunk;
  parallel_for((int64_t)groups.groups.size() * num_chunks, num_threads, [&](int64_t item) {
    const int64_t first = item % num_chunks * chunk;
    work(Part{&groups.groups[item / num_chunks], first, std::min(first + chunk, num_outputs)});
  });
}

}  // namespace
