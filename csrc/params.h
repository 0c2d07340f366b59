// The plain structs that kernels take: pointers with their shapes, no torch, no allocation.
//
// One idea runs through all of them. Whatever attention a batch needs is a list of work rows,
//     row = (query tokens that want the same keys)  ->  the list of KV pages they read,
// cut along the keys into tiles, a contiguous run of tiles for each CTA. Decode, prefill over a cached prefix, shared
// prefixes and page-sparse attention differ only in how the planner makes the rows.
#pragma once

#include <cstdint>

namespace flashcore {

enum class DType : int32_t { bf16 = 0, fp16 = 1, fp32 = 2 };

// Splits along the keys fall on multiples of this many keys, counted from the start of the row.
constexpr int kSplitUnit = 64;

// Query tokens that want the same keys. The `group` query heads of a KV head are packed beside the tokens:
// packed query m = token_in_row * group + head_in_group.
struct alignas(16) Row {
  int32_t q_begin;      // first query token, or offset into row_tokens when kPacked
  int32_t q_count;      // query tokens, at most rows_per_tile / group
  int32_t flags;        // kPacked, kSole, kAlike, AlikeRows
  int32_t page_begin;   // offset into kv_indices of the row's first page
  int32_t head_stride;  // pages from one KV head's list to the next one's; 0: all heads read the same list
  int32_t kv_len;       // keys
  int32_t kv_pos;       // position in the sequence of the first key, for the masks
  int32_t request;      // the (lowest) request of the row, for people who debug
};
constexpr int32_t kPacked = 1;  // tokens come from row_tokens: requests that share pages
constexpr int32_t kSole = 2;    // every token of the row is in no other row
constexpr int32_t kAlike = 4;   // packed, and cut as the other rows that read the same keys

// Of a row that is cut alike: which of the rows of the same keys, which follow each other, it is, and how many there
// are. They stand in the flags behind those above.
struct AlikeRows {
  static constexpr int32_t kBits = 12, kShift = 8, kMost = (1 << kBits) - 1;
  int32_t rank, rows;

  constexpr int32_t flags() const {
    const uint32_t bits = rows > kMost ? 1u << kBits : static_cast<uint32_t>(rank | rows << kBits);  // too many: alone
    return static_cast<int32_t>(bits << kShift);
  }
  static constexpr AlikeRows of(int32_t flags) {
    const uint32_t bits = static_cast<uint32_t>(flags) >> kShift;
    return {static_cast<int32_t>(bits & kMost), static_cast<int32_t>(bits >> kBits)};
  }
};

// Keys [kv_begin, kv_end) of one row for one KV head. What a kernel needs of the row stands here once more, so that it
// is one load away from the page ids and the queries.
struct alignas(16) Tile {
  int32_t pair;      // row * num_kv_heads + kv_head
  int32_t kv_begin;  // multiple of kSplitUnit
  int32_t kv_end;
  int32_t partial;     // first of q_count * group rows of partial_o / partial_lse, or -1: write out and lse directly
  int32_t page_begin;  // offset into kv_indices of the pages of the row and KV head
  int32_t q_begin;     // first query token of the row; packed: ~offset into row_tokens
  int32_t q_count;     // query tokens of the row
  int32_t kv_pos;      // position in the sequence of the row's first key
};

// Page columns [begin, end) of sparse requests that hold the same pages there, for policy topk: whoever scores one of
// these pages scores it for all of them. The requests are those of the `rank` stretches in front of this one, and its
// own.
struct alignas(16) Stretch {
  int32_t request;
  int32_t rank;
  int32_t begin, end;
};

// Slots of Plan::counts.
enum Count : int32_t {
  kNumRows = 0,
  kNumTiles = 1,
  kNumPartials = 2,
  kPagesRead = 3,   // pages of all rows, what one KV head reads
  kPagesDense = 4,  // pages the requests hold: what reading every request by itself would read
  kRowsPacked = 5,
  kOverflow = 6,  // 1: a capacity was exceeded and the plan is not usable
  kNextTile = 7,  // cursors of kernels that take tiles one by one; 0 between launches
  kNextShortTile = 8,
  kPagesDropped = 9,   // pages that top-p left out of the lists of all KV heads, since the buffers were made
  kNumStretches = 10,  // 0: no two requests have pages to score in common, and stretches are not written
  kPackedShare = 11,   // of 1024 SMs, how many packed rows are worth
  kNumCounts = 12
};

constexpr int32_t kWholeShare = 1024;  // all SMs, for kPackedShare

// Whether packed rows have a Hopper kernel of their own: it takes an SM half of the time that a kernel for all rows
// does, and some us more to start, which pays where there are many requests. The kernel of the others takes tiles of up
// to kMostApart query heads.
constexpr int32_t kMostApart = 16;
constexpr bool packs_apart(int32_t batch, int32_t num_kv_heads, int32_t group) {
  return batch * num_kv_heads >= 512 && group <= kMostApart;
}

// A batch's work, in fixed-capacity device buffers so that one captured graph serves every batch of its size.
// Written by run_plan, read by every attend variant.
struct Plan {
  int32_t* qo_indptr;      // [batch + 1] query tokens of each request
  int32_t* kv_indptr;      // [batch + 1] pages of each request
  int32_t* kv_indices;     // [max_pages] page ids; lists of sparse rows stand behind the dense ones
  int32_t* last_page_len;  // [batch] keys in the last page, 1..page_size (0: no keys)
  int32_t* positions;      // [num_tokens] position of each query token: it sees keys 0..position when causal
  Row* rows;               // [max_rows]
  int32_t* row_tokens;     // [max_row_tokens] query tokens of packed rows
  Tile* tiles;             // [max_tiles] those of a (row, kv_head) follow each other by kv_begin; packed rows first
  int32_t* pair_tiles;     // [max_rows * num_kv_heads, 2] tiles of each (row, kv_head): the first, and behind the last
  int32_t* cta_indptr;     // [num_ctas + 1] tiles of each CTA
  int32_t* merge_indptr;   // [num_tokens + 1] into merge_rows
  int32_t* merge_rows;     // [max_merge, 2] (row, index of the token in it), in the order of the keys
  Stretch* stretches;      // [max_row_tokens]
  int32_t* counts;         // [kNumCounts]
  int32_t num_ctas;
  int32_t rows_per_tile;  // packed queries a tile holds at most
  int32_t max_pages, max_rows, max_row_tokens, max_tiles, max_merge, max_partials;

  // Whether there is room for packed rows. Where the host knows that requests share nothing there is none, and only the
  // entry that every buffer has.
  constexpr bool may_pack() const { return max_row_tokens > 1; }
  // Where the tiles of the first `rows` packed rows end. Those of packed rows stand in front, row by row.
  constexpr int32_t packed_end(int32_t rows, int32_t num_kv_heads) const {
    return rows > 0 ? pair_tiles[2 * rows * num_kv_heads - 1] : 0;
  }
};

// From SGLang's req_to_token to a CSR page table. The slots of a page follow each other: page * page_size + offset.
struct PageTableParams {
  const int32_t* req_to_token;      // [max_requests, req_to_token_stride]
  const int64_t* req_pool_indices;  // [batch]
  const int64_t* seq_lens;          // [batch] keys of each request
  int32_t* kv_indptr;               // [batch + 1]
  int32_t* kv_indices;              // [max_pages]
  int32_t* last_page_len;           // [batch]
  int64_t req_to_token_stride;
  int32_t batch, page_size, max_pages;
  void* stream;  // cudaStream_t
};

enum class Policy : int32_t { exact = 0, window = 1, topk = 2 };

// What the rows of policies window and topk read, and where the lists of these pages stand.
struct SparseRows {
  int32_t sink_pages, recent_pages;    // always read, at the start and at the end of a request
  int32_t budget_pages, budget_share;  // topk: pages in all, or 65536ths of the request's where that is more
  int32_t list_pages;                  // entries of a row's list, at least what the row reads
  int32_t begin;                       // where the lists start in kv_indices

  // Pages that a request of `pages` reads under policy topk.
  constexpr int32_t topk_pages(int32_t pages) const {
    const auto share = static_cast<int32_t>((static_cast<uint64_t>(pages) * budget_share + 65535) / 65536);
    const int32_t wanted = share > budget_pages ? share : budget_pages;
    return wanted < list_pages ? wanted : list_pages;
  }
};

// From a CSR page table to rows, tiles and CTA ranges.
struct PlanParams {
  Plan plan;
  int32_t* scratch;  // [scratch_size] written anew by every plan
  int64_t scratch_size;
  int32_t batch, num_tokens;  // num_tokens = qo_indptr[batch], known to the host
  int32_t num_kv_heads, group, page_size, num_pages;
  int32_t causal, window_left;  // window_left < 0: off
  Policy policy;                // window and topk apply to requests of one query token only
  SparseRows sparse;
  int32_t share;       // find shared prefixes, to be packed or scored together (requests of one query token only)
  int32_t pack_keys;   // keys of a KV head that packed rows save for each query of one, and 48 more, or there are none
  int32_t split_keys;  // 0: balance tiles over the CTAs; else cut every row each split_keys keys, whatever the batch
  int32_t beside;      // 1: the launch before is another plan of the same page table
  void* stream;
};

// Plans of which a kernel leaves partial results: all, those with packed rows, or none, since it merges by itself.
enum class Merges : int32_t { all, packed, none };

struct AttendParams {
  Plan plan;
  const void* q;       // [num_tokens, num_qo_heads, head_dim], strides in elements, last dimension contiguous
  const void* k;       // [num_pages, page_size, num_kv_heads, head_dim]
  const void* v;       // as k
  void* out;           // [num_tokens, num_qo_heads, head_dim] contiguous
  float* lse;          // [num_tokens, num_qo_heads] base 2, may be nullptr
  float* partial_o;    // [max_partials, head_dim] normalised
  float* partial_lse;  // [max_partials] base 2
  void* workspace;     // cublaslt only: [workspace_bytes]
  int64_t workspace_bytes;
  int64_t q_stride_token, q_stride_head;
  int64_t k_stride_page, k_stride_token, k_stride_head;
  int64_t v_stride_page, v_stride_token, v_stride_head;
  int32_t batch, num_tokens, num_qo_heads, num_kv_heads, head_dim, page_size, num_pages;
  float sm_scale, logits_soft_cap;  // logits_soft_cap 0: off
  int32_t causal, window_left;
  DType dtype;
  int32_t decode;                  // 1: every request has one query token
  int32_t max_qo_len, max_kv_len;  // of the longest requests, known to the host; cublaslt only
  int32_t fp32_scores;             // what the scores are kept in, else fp16; cublaslt only
  int32_t lists_begin;             // kv_indices from here on are written by select, launched just before; 0: none
  int32_t free_cuts;               // 1: rows say all that is to be read, and may be cut otherwise than into the tiles
  Merges merges;                   // which plans leave partial results for the merge
  int32_t num_sms;
  void* stream;
};

// What stands for the keys of a page when it is scored: one or two vectors of head_dim channels for each KV head.
enum class SummaryKind : int32_t { mean_std = 0, min_max = 1, mean = 2 };

struct PageSummaries {
  void* data;  // [num_pages, num_kv_heads, vectors, head_dim], dtype of k, or e4m3 where fp8
  SummaryKind kind;
  int32_t fp8;

  constexpr int32_t vectors() const { return kind == SummaryKind::mean ? 1 : 2; }
};

// Summaries of pages whose keys changed.
struct SummarizeParams {
  const void* k;                 // [num_pages, page_size, num_kv_heads, head_dim]
  const int32_t* kv_indptr;      // [batch + 1]
  const int32_t* kv_indices;     // [max_pages]
  const int32_t* last_page_len;  // [batch]
  const int32_t* first_page;     // [batch] first page column to rebuild; nullptr: the last one, where it is full
  PageSummaries summaries;
  int64_t k_stride_page, k_stride_token, k_stride_head;
  int32_t batch, max_columns, num_kv_heads, head_dim, page_size, num_pages;
  DType dtype;
  void* stream;
};

// Keys and values of new tokens, to be written to the slots that they have in the cache: page * page_size + offset.
struct NewTokens {
  const void* k;  // [num_tokens, num_kv_heads, head_dim], as v; nullptr: they are in the cache already
  const void* v;
  const int64_t* slots;      // [num_tokens]
  const int32_t* qo_indptr;  // [batch + 1] tokens of each request, the last ones of its sequence; nullptr: one each
  int64_t k_stride_token, k_stride_head, v_stride_token, v_stride_head;
};

// Stores new tokens and brings the summaries of their requests' pages up to date: without first_page that of the last
// page, where a step of one token each has filled it.
struct StoreParams {
  SummarizeParams pages;
  NewTokens tokens;
  void* v;  // the cache's, as pages.k
  int64_t v_stride_page, v_stride_token, v_stride_head;
};

// How the scores of a KV head's query heads become one.
enum class GroupReduction : int32_t { max = 0, mean = 1, logsumexp = 2 };

// Scores every page of each sparse request for each KV head and writes the chosen ones, in the order of the sequence,
// into the sparse part of kv_indices. Requests within the budget are left alone: their rows are dense. Where top-p
// makes a list shorter than the plan has it, the tiles of its KV head end with it.
struct SelectParams {
  Plan plan;
  SummarizeParams pages;  // its kv_indptr, kv_indices and last_page_len are the plan's, first_page is nullptr
  const void* q;          // [batch, num_qo_heads, head_dim]
  float* scores;          // [batch * num_kv_heads, max_columns] scratch
  int64_t q_stride_token, q_stride_head;
  GroupReduction group_reduction;
  float std_weight;    // of the deviations of summary kind mean_std
  float sm_scale;      // of the logits; logsumexp and top-p
  int32_t mass_share;  // 65536ths of the softmax mass that are enough (top-p); 65536: the whole budget is read
  int32_t num_qo_heads;
  SparseRows sparse;
  int32_t num_sms;
};

// A decode layer that stores the step's tokens, selects its pages and attends to them.
struct SelectAttendParams {
  SelectParams select;
  AttendParams attend;
  NewTokens tokens;  // one of each request; its caches are those of attend, its summaries those of select
  int32_t early;     // 1: plan and summaries were ready before the launch ahead of this one began
};

// Every run_* returns 0 or a cudaError_t (CPU: 0).
int run_page_table_cuda(const PageTableParams&);
int run_page_table_cpu(const PageTableParams&);
int run_plan_cuda(const PlanParams&);
int run_plan_cpu(const PlanParams&);
int run_store_cuda(const StoreParams&);
int run_store_cpu(const StoreParams&);
int run_select_cuda(const SelectParams&);
int run_select_cpu(const SelectParams&);

// attend, one function a variant; merge combines the partials of a token in the order of merge_rows.
int run_attend_wmma_sm80(const AttendParams&);
int run_attend_wgmma_sm90_decode(const AttendParams&);
int wgmma_sm90_decode_merges(const AttendParams&);  // a Merges
// One launch for select, attend and merge, for the layers that wgmma_sm90_decode_selects.
bool wgmma_sm90_decode_selects(const SelectAttendParams&);
int run_select_attend_wgmma_sm90_decode(const SelectAttendParams&);
int run_attend_wgmma_sm90_prefill(const AttendParams&);
int run_attend_cublaslt(const AttendParams&);
int run_attend_cpu(const AttendParams&);
int run_merge_cuda(const AttendParams&);
int run_merge_cpu(const AttendParams&);

}  // namespace flashcore
